"""Is a tower still made as it was? A mark that a glance compares, and the words for what has changed.

:class:`Watch` notices what a forward pass may depend on besides numbers: modules, methods of their classes,
forwards, hooks (global ones too), plain settings, and which parameters there are, of what type. What has
changed in words is asked of two views, the old one and a fresh one (:func:`difference`).
"""

import sys
import types
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as everywhere

from residual_kernels.towers.view import Tower

# Settings that change nothing in the output, or nothing that is not looked at where it matters (`training`).
_NOT_LOOKED_AT = {
    "training",
    "grad_checkpointing",
    "gradient_checkpointing",
    "_is_full_backward_hook",
    "_compiled_call_impl",
}
# What a setting that a module keeps as an attribute may be.
_SETTINGS = (bool, int, float, str, tuple, type(None), types.FunctionType, types.MethodType)
_METHODS = (types.FunctionType, property, staticmethod, classmethod)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # people put new tables in their places to clear them
# Functions that forwards look up at every call, so that whoever replaces one changes all towers.
FUNCTIONS = (
    "conv2d",
    "gelu",
    "layer_norm",
    "linear",
    "multi_head_attention_forward",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
)
_FUNCTIONAL = itemgetter(*FUNCTIONS)
_COUNTED = 3  # changes after which a number that only grows is taken for a counter


class Watch:
    """Notices that a module is no longer made as it was.

    Args:
        module: looked at with all modules in it.
        beside: other modules that its forward depends on, looked at without those in them.
        before: the watch that this one follows. Numbers that have only grown at several changes are counters,
            and are no longer looked at.
    """

    def __init__(self, module: nn.Module, beside: Iterable[nn.Module] = (), before: "Watch | None" = None):
        self._parts = list(dict.fromkeys([*module.modules(), *beside]))
        self._grown = {} if before is None else before._growing()
        self._attributes = [part.__dict__ for part in self._parts]
        self._names = [self._settings(part) for part in self._parts]
        self._getters = [itemgetter(*_HOOKS, *names) for names in self._names]
        hooks = [attributes[name] for attributes in self._attributes for name in _HOOKS]
        hooks += [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
        children, parameters = (
            [attributes.get(name, {}) for attributes in self._attributes]  # torch.jit's modules have none
            for name in ("_modules", "_parameters")
        )
        # Most of these tables are empty, and that is asked of all of them at once.
        self._empty = [table for table in (*hooks, *children, *parameters) if not table]
        self._hooks = [table for table in hooks if table]
        self._children = [table.values() for table in children if table]
        self._parameters = [table.values() for table in parameters if table]
        theirs = any(type(part).__module__.startswith("transformers.") for part in self._parts)
        self._registered = [table.values() for table in registered_attentions()] if theirs else []
        classes = dict.fromkeys(chain.from_iterable(type(part).__mro__ for part in self._parts))
        self._classes = [vars(kind) for kind in classes if kind is not object]
        self._methods = [_methods(table) for table in self._classes]
        self._seen = self._now()

    def _now(self) -> tuple[list | tuple, ...]:
        """Everything that is compared; built by loops in C."""
        return (
            [get(attributes) for get, attributes in zip(self._getters, self._attributes)],  # noqa: B905  (strict is slower)
            list(map(type, self._parts)),
            list(map(len, self._attributes)),
            list(chain.from_iterable(self._hooks)),
            list(chain.from_iterable(self._children)),
            list(map(type, chain.from_iterable(self._parameters))),
            list(map(len, self._classes)),
            [get(table) for get, table in zip(self._methods, self._classes)],  # noqa: B905
            _FUNCTIONAL(vars(functional)),
            list(chain.from_iterable(self._registered)),
        )

    def unchanged(self) -> bool:
        """Whether all is as it was; about a fifth of a microsecond a module."""
        try:
            return not any(self._empty) and self._now() == self._seen
        except (KeyError, RuntimeError):  # an attribute is gone, or a tensor now, which compares with nothing
            return False

    @property
    def mark(self) -> int:
        """A number that two watches of the same parts in the same state share."""
        values, *rest = self._seen
        plain = (tuple(value for value in found[len(_HOOKS) :]) for found in values)
        return hash((*map(id, self._parts), *plain, *(tuple(map(_name, each)) for each in rest)))

    def _settings(self, part: nn.Module) -> list[str]:
        return [
            name
            for name, value in part.__dict__.items()
            if name not in _NOT_LOOKED_AT and _plain(value) and self._grown.get((part, name), 0) < _COUNTED
        ]

    def _growing(self) -> dict[tuple[nn.Module, str], int]:
        """How often numbers have grown, without any other change, up to now."""
        grown = {key: count for key, count in self._grown.items() if count >= _COUNTED}
        for part, names, values in zip(self._parts, self._names, self._seen[0], strict=True):
            for name, old in zip(names, values[len(_HOOKS) :], strict=True):
                new: Any = part.__dict__.get(name)
                known = self._grown.get((part, name), 0)
                grew = type(old) in (int, float) and type(new) is type(old) and new > old
                if grew or (known and new == old):
                    grown[part, name] = known + grew
        return grown


def registered_attentions() -> list[dict[str, Any]]:
    """The functions that transformers' modules look up by name at every call, in one or two tables."""
    found = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    tables = (getattr(found, name, None) for name in ("_local_mapping", "_global_mapping"))
    return [table for table in tables if isinstance(table, dict)]


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(each, bool | int | float | str) for each in value)
    return isinstance(value, _SETTINGS)


def _methods(table: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], tuple]:
    """What reads the methods of a class."""
    names = [name for name, value in table.items() if isinstance(value, _METHODS)]
    return itemgetter("__module__", "__module__", *names)  # two more, so that it is always a tuple


def _name(value: Any) -> Any:
    return value if isinstance(value, int | tuple) else id(value)


def difference(old: Tower, new: Tower, folded: Mapping[str, tuple[int, ...]] | None = None) -> str | None:
    """What a fresh view of a tower says otherwise than the view made before, in words; None where nothing.

    `folded` are the parameters that the old view's constants are made of, and their shapes.
    """
    if old.layout.layers != new.layout.layers:
        return f"it has {new.layout.layers} blocks now, and had {old.layout.layers}"
    for what, fact in _FACTS.items():
        was, now = fact(old), fact(new)
        if was != now:
            return f"{what} {_shown(now)} now, and was {_shown(was)}"
    if folded is None:
        return None
    found = {name: tuple(p.shape) for name, p in new.constant_parameters().items()}
    if more := [name for name in found if name not in folded]:
        return f"{more[0]} has been added, and its constants know nothing of it"
    if gone := [name for name in folded if name not in found]:
        return f"{gone[0]} has been taken away"
    if other := [name for name in found if found[name] != folded[name]]:
        return f"{other[0]} has the shape {found[other[0]]} now, and had {folded[other[0]]}"
    return None


_FACTS: dict[str, Callable[[Any], Any]] = {
    "its family is": lambda view: view.name,
    "its pooling is": lambda view: view.pooling,
    "the run of tokens that it pools is": lambda view: view.span,
    "the size of its embedding (D) is": lambda view: view.dim,
    "its width is": lambda view: view.width,
    "its number of heads is": lambda view: view.layout.heads,
    "the size of its heads (C) is": lambda view: view.head_width,
    "its kinds of units are": lambda view: view.layout.kinds,
    "the number of tokens before its patches is": lambda view: view.prefix,
}


def counter(p: Tensor) -> int | None:
    """A parameter's version counter, which every write but one through `.data` raises;
    None where it has none."""
    return None if p.is_inference() else p._version


def _shown(value: Any) -> str:
    if isinstance(value, slice):
        return f"{value.start or 0} to {'the last' if value.stop is None else value.stop}"
    return repr(value) if isinstance(value, str) else str(value)
