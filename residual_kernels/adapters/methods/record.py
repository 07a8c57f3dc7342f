"""What is a method?

One record that says how an adapter is built by name, what it reads and where it starts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.spectral_bases import SpectralBases

ENERGY = 0.90  # of the paper: explained variance kept per head
TRUNCATION = ("energy", "components", "max_components")


@dataclass(frozen=True)
class Method:
    """A way of adapting a tower, by name.

    What an adapter does afterwards is its class's own: `component_weight` says how learned numbers map to
    components, `merge` how they are folded away, `options` and its parameters what is kept on disk,
    `weights_on` what is drawn.

    Attributes:
        name: how it is called on the command line, in a sweep's plan and in tables.
        summary: what it adapts and what becomes of the rest, in a few words.
        adapter: the class of what it builds.
        make: called with (tower, bases, seed=..., **options): `init` where the method has a start, and the
            options that were given.
        start: the weights it starts from: "normal" (N(1, 1)), "ones", or None where there is no choice.
        kinds: kinds of units it adapts: what a cache or bases must hold.
        options: names of the options it takes, of "rest", "energy", "components" and "max_components".
        rests: what `rest` may be; the first is its own.
        needs_bases: whether bases must be given.
        lr: AdamW's learning rate.
    """

    name: str
    summary: str
    adapter: type[TowerAdapter]
    make: Callable[..., TowerAdapter]
    start: str | None
    kinds: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    rests: tuple[str, ...] = ()
    needs_bases: bool = True

    @property
    def lr(self) -> float:
        return self.adapter.default_lr

    @property
    def placement(self) -> str:
        """Where it works, and with that the placement of its bases: "output" or "stream"."""
        return self.adapter.placement

    @property
    def runs_the_tower(self) -> bool:
        """Whether a fit needs the images: what the tower computes depends on the weights,
        so nothing can be cached."""
        return self.placement == "stream"

    @property
    def learns(self) -> bool:
        """Whether there is anything to fit."""
        return self.adapter.weights_on != "nothing"

    def check(self, **options: object) -> None:
        """Raises ValueError when an option is given (is not None) that this method does not read."""
        from residual_kernels.adapters.methods import METHODS

        given = [name for name, value in options.items() if value is not None]
        truncation = [name for name in given if name in TRUNCATION and name not in self.options]
        if truncation:
            ours = [method.name for method in METHODS.values() if truncation[0] in method.options]
            raise ValueError(
                f"{' and '.join(truncation)} belongs to {', '.join(ours)}; {self.name} keeps all components"
            )
        rest = options.get("rest")
        if rest is not None and rest not in self.rests:
            if not self.rests:
                how = "leaves them all in the tower" if self.kinds else "adapts the output as a whole"
                raise ValueError(f"rest={rest!r} is about other units, but {self.name} {how}")
            raise ValueError(f"rest of {self.name} must be one of {', '.join(self.rests)}; got {rest!r}")
        unknown = [name for name in given if name not in (*TRUNCATION, "rest")]
        if unknown:
            raise ValueError(f"{self.name} has no option {unknown[0]!r}")


def truncated(
    bases: SpectralBases,
    energy: float | None = None,
    components: int | None = None,
    max_components: int | None = None,
) -> SpectralBases:
    """The bases with as many components as the options say.

    The paper's 0.90 of the variance where they do not.
    """
    if components is None and energy is None:
        energy = ENERGY
    return bases.truncate(energy=energy, components=components, max_components=max_components)
