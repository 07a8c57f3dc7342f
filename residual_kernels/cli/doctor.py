"""What is here? Versions, devices, and for each device which backend computes and why another does not."""

import platform
import re
from importlib import metadata

import torch

from residual_kernels.extras import EXTRAS
from residual_kernels.ops import backends

PACKAGES = (
    "torch",
    "triton",
    "open_clip_torch",
    "timm",
    "numpy",
    "safetensors",
    "schedulefree",
    "scikit-learn",
)


def facts() -> dict:
    """Versions, devices and extras.

    {"versions": {package: version}, "devices": [{"device", "detail", "auto", "backends": {name: state}},
    ...], "extras": {name: {"for", "state", "missing": [library, ...]}}}
    """
    from residual_kernels import __version__

    versions = {"residual-kernels": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return {
        "versions": versions,
        "devices": [_device(torch.device(name)) for name in names],
        "extras": {name: _extra(name, what) for name, what in EXTRAS.items()},
    }


def _extra(name: str, what: str) -> dict:
    """Whether the libraries of an extra are here, as this package's own metadata lists them."""
    missing = []
    for line in metadata.requires("residual-kernels") or ():
        library = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        if re.search(rf"extra == ['\"]{name}['\"]", line) and library != "residual-kernels":
            try:
                metadata.version(library)
            except metadata.PackageNotFoundError:
                missing.append(library)
    state = "ready"
    if missing:
        state = f"missing: {', '.join(missing)}; pip install 'residual-kernels[{name}]'"
    return {"for": what, "state": state, "missing": missing}


def _device(device: torch.device) -> dict:
    detail = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    auto = backends.available(device)[0]
    states = {}
    for name in backends.BACKENDS:
        reason = backends.missing(name, device, by_name=False)
        if reason is not None:
            states[name] = f"missing: {reason}"
        else:
            states[name] = "ready, used by auto" if name == auto else "ready"
            if name == "cpp":
                from residual_kernels.ops import cpp_backend  # the extension is optional

                used, slower = cpp_backend.instruction_set()
                why = "".join(f"; not {faster}: {cause}" for faster, cause in slower.items())
                states[name] += f"; instruction set {used}, {cpp_backend.MEASURED[used]}{why}"
    return {"device": str(device), "detail": detail, "auto": auto, "backends": states}
