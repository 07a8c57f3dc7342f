import importlib.util
import os

# Read when a kernel module is imported: kernels run interpreted, unless TRITON_INTERPRET=0 asks for a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


def _old_interpreter() -> None:
    """The interpreter of Triton before 3.7 makes an int of an array that holds one number.

    Numpy 2.4 refuses that.
    """
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope) -> None:
        def index(self) -> int:
            return int(self.handle.data.squeeze())

        patch(tensor, *scope)
        if scope:  # since 3.6, what is patched is put back from there
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None:
    _old_interpreter()
