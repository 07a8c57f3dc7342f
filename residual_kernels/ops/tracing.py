"""What does torch.compile take as found when it traces?"""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_when_traced(function: Function) -> Function:
    """Marks a function whose answer a compiler's graph may hold: it is called while the graph is made.

    As torch.compiler.assume_constant_result does, which would load the compiler, and with it
    sympy, a second before anything is computed.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
