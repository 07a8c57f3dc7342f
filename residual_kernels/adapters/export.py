"""How does a merged model leave Python? As a file that runs where this package is absent: ONNX, or torch.export's pt2.

Every file is run before it is put in place, and its numbers are compared with the module's.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from residual_kernels import extras

ENDINGS = (".onnx", ".pt2")
AGREEMENT = 1e-4  # relative error beyond which a written file is not kept (8 roundings in half precision)


def write(module: nn.Module, path: str | os.PathLike, images: Tensor, *, verify: bool = True) -> float | None:
    """Writes an image encoder that takes batches of any size, and returns how far its numbers are from the module's.

    Args:
        module: what ``residual.merge()`` returned, or any tower. An adapter that is not merged goes to .pt2 alone, and
            is read where this package is installed (its operator is ours).
        path: ends with .onnx (input "images", output "embedding"; weights beyond 2 GB lie in a file beside it) or .pt2
            (``torch.export.load(path).module()(images)``).
        images: [N, 3, H, W], preprocessed: what the module is traced and the file is checked with.
        verify: run the file and compare; otherwise None is returned. .onnx needs onnxruntime for it.

    Raises:
        ValueError: another ending, images that are not on the CPU, or bfloat16 for .onnx.
        ImportError: a package is missing; the message says how to get it.
        RuntimeError: the file gives other numbers than the module (more than 1e-4 apart, or 8 roundings of the dtype).

    The file appears whole or not at all.
    """
    path = Path(path)
    check_ending(path)
    if images.device.type != "cpu":
        raise ValueError(
            f"images are on {images.device}; a file for everywhere is made on the CPU: move module and images there"
        )
    if path.suffix == ".onnx" and images.dtype == torch.bfloat16:
        raise ValueError("bfloat16 models do not run in onnxruntime; write a float32 one: module.float()")
    if len(images) == 1:  # a batch of one would be taken for the only size
        images = torch.cat([images, images])
    with _evaluating(module), torch.no_grad():
        expected = _first(module(images))
        with tempfile.TemporaryDirectory(
            dir=_made(path.parent), prefix=f".{path.name}.", ignore_cleanup_errors=True
        ) as folder:
            file = Path(folder) / path.name
            shapes = ({0: torch.export.Dim("batch")},)
            if path.suffix == ".onnx":
                _need("onnxscript")
                program = torch.onnx.export(
                    module, (images,), dynamo=True, dynamic_shapes=shapes, input_names=["images"],
                    output_names=["embedding"], verbose=False,
                )  # fmt: skip
                program.save(file)
            else:
                torch.export.save(torch.export.export(module, (images,), dynamic_shapes=shapes), file)
            error = None
            if verify:  # one image too: another batch size than it was traced with
                errors = [_compared(run(file, images[:n]), expected[:n], path) for n in (1, len(images))]
                error = max(errors)
            for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
                os.chmod(part, 0o644)
                os.replace(part, path.parent / part.name)
    return error


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


def _need(name: str):
    return extras.need(name, "export", "writing ONNX files")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, every part put back as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
