"""The options of every command that reads images, declared once; light, so that `--help` loads no library."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from residual_kernels.cli import options
from residual_kernels.cli.given import GIVEN

_OPTIONS = {  # of a Reader: parameter of the command -> (its type, default)
    "batch_size": (options.EncodeBatch, 64),
    "workers": (options.Workers, 0),
    "data_root": (options.DataRoot, None),
    "download": (options.Download, False),
    "unreadable": (options.Unreadable, options.OnUnreadable.fail),
    "orientation": (options.Oriented, options.Orientation.exif),
    "image_column": (options.ImageColumn, None),
    "label_column": (options.LabelColumn, None),
}


def reads_images(command: Callable) -> Callable:
    """A command with a parameter `reader` gets the options of a :class:`Reader` in its place.

    Where the command has a `batch_size` of its own, that of the reader is called --encode-batch alone. A
    command with an `encode_batch` of its own makes no batches by the reader.
    """
    signature = inspect.signature(command)
    given = dict(_OPTIONS)
    if "batch_size" in signature.parameters:
        del given["batch_size"]
        given["encode_batch"] = (options.EncodeBatchOnly, 64)
    if "encode_batch" in signature.parameters:
        del given["batch_size"]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in signature.parameters.values()
        if parameter.name != "reader"
    ]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in given.items()
    ]
    parameters = own[:-2] + shared + own[-2:]  # before --device and --json, which every command has last

    @functools.wraps(command)
    def called(**values: Any) -> None:
        from residual_kernels.cli.inputs import Reader

        mine = {name: values.pop(name) for name in given}
        mine["root"] = mine.pop("data_root")
        if "encode_batch" in mine:
            mine["batch_size"] = mine.pop("encode_batch")
        command(reader=Reader(**mine, asked=GIVEN.get()), **values)

    vars(called)["__signature__"] = signature.replace(parameters=parameters)
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
