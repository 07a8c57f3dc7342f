"""How does a merged model leave Python?

As a file that runs where this package is absent: ONNX, or torch.export's pt2.

Every file is run before it is put in place, and its numbers are compared with the module's.
"""

import contextlib
import copy
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from residual_kernels import extras
from residual_kernels.files import digest, naming
from residual_kernels.partial_files import Partial, flush

ENDINGS = (".onnx", ".pt2")
AGREEMENT = 1e-4  # relative error beyond which a written file is not kept (8 roundings in half precision)


def write(module: nn.Module, path: str | os.PathLike, images: Tensor, *, verify: bool = True) -> float | None:
    """Writes an image encoder that takes batches of any size, and compares the file with the module.

    Args:
        module: what ``residual.merge()`` returned, or any tower. An adapter that is not merged goes to .pt2
            only, and is read where this package is installed (its operator is ours).
        path: ends with .onnx (input "images", output "embedding"; weights beyond 2 GB lie in a file beside
            it) or .pt2 (``torch.export.load(path).module()(images)``).
        images: [N, 3, H, W], preprocessed: what the module is traced and the file is checked with. The file
            is made on the CPU: a module on another device is copied there, and images are moved.
        verify: run the file and compare. For .onnx this needs onnxruntime.

    Returns:
        The largest difference between the file's embeddings and the module's; None without `verify`.

    Raises:
        ValueError: another ending, or bfloat16 for .onnx.
        ImportError: a package is missing; the message says how to get it.
        RuntimeError: the file gives other numbers than the module (more than 1e-4 apart, or 8 roundings of
            the dtype).

    The file appears whole or not at all.
    """
    path = Path(path)
    check_ending(path)
    if images.is_meta:
        raise ValueError(
            "images on the meta device hold no values; give real images, with which the file is traced "
            "and checked"
        )
    images = images.detach().cpu()
    if any(value.device.type != "cpu" for value in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).to("cpu")  # a file for everywhere is made on the CPU
    if path.suffix == ".onnx" and images.dtype == torch.bfloat16:
        raise ValueError("bfloat16 models do not run in onnxruntime; write a float32 one: module.float()")
    if len(images) == 1:  # a batch of one would be taken for the only size
        images = torch.cat([images, images])
    with _evaluating(module), torch.no_grad():
        expected = _first(module(images))
        with naming(path):
            return _write(module, path, images, expected, verify)


def _write(module: nn.Module, path: Path, images: Tensor, expected: Tensor, verify: bool) -> float | None:
    with contextlib.closing(Partial(path.resolve(), folder=True)) as part:
        shapes = ({0: torch.export.Dim("batch")},)
        if path.suffix == ".onnx":
            _need("onnxscript")
            with _without_fast_attention():
                exported = torch.export.export(module, (images,), dynamic_shapes=shapes)
                # Given what is exported already, torch takes no other way, such as one that fixes the batch.
                program = torch.onnx.export(
                    exported,
                    dynamo=True,
                    dynamic_shapes=shapes,
                    input_names=["images"],
                    output_names=["embedding"],
                    verbose=False,
                )
            # the data file of a large model has this name and ".data": not that of another model's data
            file = part.path / f"{path.stem}-{digest(module.state_dict(), {})[:16]}.onnx"
            assert program is not None  # None comes of the old exporter alone
            program.save(file)
        else:
            file = part.path / path.name
            written = io.BytesIO()  # torch's own writer of files ends the process when the disk is full
            torch.export.save(torch.export.export(module, (images,), dynamic_shapes=shapes), written)
            file.write_bytes(written.getbuffer())
        error = None
        if verify:  # one image too: another batch size than it was traced with
            errors = [_compared(run(file, images[:n]), expected[:n], path) for n in (1, len(images))]
            error = max(errors)
        if path.is_file():
            file.chmod(stat.S_IMODE(path.stat().st_mode))
        for one in part.path.iterdir():
            flush(one)
        old = _data_file(path)
        data = [one for one in part.path.iterdir() if one != file]
        for one in data:
            os.replace(one, path.parent / one.name)
        os.replace(file, part.place)
        flush(part.place.parent)
        if old is not None and old.name not in [one.name for one in data]:
            old.unlink(missing_ok=True)
    return error


def _data_file(path: Path) -> Path | None:
    """The file beside an ONNX file that holds its weights, where :func:`write` made one."""
    if path.suffix != ".onnx" or not path.is_file():
        return None
    named = re.search(rb"%s-[0-9a-f]{16}\.onnx\.data" % re.escape(os.fsencode(path.stem)), _read_start(path))
    return None if named is None else path.parent / os.fsdecode(named[0])


def _read_start(path: Path) -> bytes:
    """A model with its weights beside it is small; of another the beginning is enough to see that."""
    with path.open("rb") as file:
        return file.read(2**26)


def run(path: str | os.PathLike, images: Tensor) -> Tensor:
    """Embeddings [N, D] of images from a file that :func:`write` wrote, on the CPU."""
    path = Path(path)
    check_ending(path)
    images = images.detach().cpu()
    if path.suffix == ".pt2":
        with torch.no_grad():
            return _first(torch.export.load(path).module()(images))
    session = _need("onnxruntime").InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def check_ending(path: Path) -> None:
    if path.suffix not in ENDINGS:
        raise ValueError(f"an exported model ends with {' or '.join(ENDINGS)}; got {path.name}")
    try:
        os.fspath(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"cannot write {path}: PyTorch and ONNX take names in UTF-8 alone; name a file elsewhere"
        ) from error


def _need(name: str):
    return extras.need(name, "export", "writing ONNX files")


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _compared(got: Tensor, expected: Tensor, path: Path) -> float:
    expected = expected.cpu().double()
    error = float((got.double() - expected).norm() / expected.norm())
    allowed = max(AGREEMENT, 8 * torch.finfo(got.dtype).eps)
    if not error <= allowed:  # NaN too
        raise RuntimeError(
            f"the file for {path} gives other numbers than the module (relative error {error:.2g}, "
            f"{allowed:.0e} is allowed), so it was not kept"
        )
    return error


@contextlib.contextmanager
def _without_fast_attention() -> Iterator[None]:
    """nn.MultiheadAttention by its plain operators: ONNX has no word for the one that frozen weights take."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, every part put back as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
