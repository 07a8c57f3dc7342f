"""Optional libraries: imported where a feature needs them,
and named with their extra when they are missing."""

import importlib
from types import ModuleType

EXTRAS = {  # extra of pyproject.toml -> what it is for
    "demo": "the demonstration on handwritten digits",
    "plot": "figures and drawn images",
    "sweep": "sweeps over towers and data sets",
    "report": "the HTML report",
    "data": "WebDataset shards, Hugging Face data sets and clip_benchmark's prompts",
    "hf": "models of transformers",
    "export": "ONNX files",
    "pandas": "rows as a pandas DataFrame",
    "tensorboard": "fits logged to TensorBoard",
    "wandb": "fits logged to Weights & Biases",
    "mlflow": "fits logged to MLflow",
    "peers": "the comparison with other methods",
}


def need(module: str, extra: str, what: str) -> ModuleType:
    """Imports an optional library.

    Args:
        module: the module to import, e.g. `matplotlib.figure`.
        extra: the extra that installs it, a key of EXTRAS.
        what: what needs it, for the message, e.g. "drawing figures".

    Raises:
        ImportError: the library is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f"{what} needs the library `{name}`; install it with pip install 'residual-kernels[{extra}]' "
            f"({error})"
        ) from error
