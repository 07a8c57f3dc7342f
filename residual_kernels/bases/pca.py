"""Where bases come from: one streaming pass over images, or over units kept before."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn

from residual_kernels import distributed, towers
from residual_kernels.bases.moments import MomentSum, StreamMoments
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases, check_placement, from_moments
from residual_kernels.towers import Tower, UnitMaps
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import ROWS, UnitSource, unit_source

log = logging.getLogger(__name__)
MOMENT_ROWS = 2 * ROWS  # of a cache at a time: moments like long products


def fit_bases(
    tower: nn.Module,
    loader: "Iterable | UnitCache",
    kinds: Iterable[str] = ("head",),
    *,
    placement: str = "output",
    tokens: str | None = None,
    progress: Callable[[int], None] | None = None,
    check: bool = True,
) -> SpectralBases:
    """Fits the mean and principal components of every unit in one streaming pass.

    Memory does not grow with the data.

    Args:
        tower: a supported image tower, or a ResiDual around one.
        loader: yields image batches [N, 3, H, W], or (images, labels, ...); the labels are not read. Or a
            UnitCache of this tower that holds the kinds: then the tower does not run.
        kinds: which units: "head", "mlp", "emb", and "pool" where there is one. The output's own basis is
            always fitted too, and alone with ().
        placement: "output" for units as shares of the output, "stream" for heads where they enter the
            residual stream: in model width, over tokens (a row is an image's token), from a loader alone.
        tokens: of the stream: "all" (the default), "class" or "patches" (without class token and registers).
        progress: called with the number of images after every batch.
        check: compare the first image with the model's own forward, as :func:`residual_kernels.decompose`
            does.

    Returns:
        :class:`SpectralBases` with min(D, C+2) components a unit (that is a head's exact rank; C in the
        stream), in float64, covariance over n - 1. With fewer rows than that the last ones have no variance:
        truncate by energy, or fit on more. The result of two calls merges exactly: ``a.merge(b)``.

    Raises:
        ValueError: fewer than 2 images (tokens in the stream), images the tower cannot take (NaN and Inf are
            named by index), or arguments that do not go together.

    Deterministic for the same batches on the same machine; the tower is left bitwise as it was. In a process
    group all processes call it, each with a loader of its own share of the images, or all with the same
    cache, whose rows they share; all get the bases of all images. From one cache these do not depend on the
    number of processes (but for the last digits of float64).
    """
    view = towers.view_inside(tower, check)
    kinds = towers.check_kinds(kinds, view.layout) if kinds else ()
    check_placement(placement, tokens)
    view.check_mode()
    source = unit_source(loader, tower, kinds, check=check)
    if placement == "stream":
        return _fit_in_stream(view, source, kinds, tokens or "all", progress)
    sums = {}
    for kind in kinds:
        maps = view.maps(kind)
        distinct = len(maps.A) if maps.A.stride(0) else 1  # MLPs share one map
        rows = UnitMaps(maps.A[:distinct], maps.b[:distinct], maps.g, maps.e, maps.share).rows()
        sums[kind] = MomentSum(rows, maps.e / maps.share)
    eye = torch.eye(view.dim, dtype=torch.float64)
    blank = torch.zeros(2, view.dim, dtype=torch.float64)
    sums[OUTPUT] = MomentSum(torch.cat([eye, blank])[None], torch.zeros(view.dim, dtype=torch.float64))
    _agree(view, source, kinds, placement)
    first = source.first(MOMENT_ROWS)
    if first is not None:  # sums run about the mean of these rows, whichever process counts them
        for kind in kinds:
            sums[kind].about(first.z[kind], first.scale, first.mean)
        sums[OUTPUT].about(first.output[:, None, :], None, None)
    for batch in source.batches(MOMENT_ROWS, shared=True):
        terms = batch.terms
        for kind in kinds:
            sums[kind].add(terms.z[kind], terms.scale, terms.mean)
        sums[OUTPUT].add(terms.output[:, None, :], None, None)
        if progress is not None:
            progress(len(terms.output))
    _check_count(sums[OUTPUT].count, "images")
    log.info("bases of %s from %d images", ", ".join(kinds), sums[OUTPUT].count)
    return from_moments(_shell(view), {kind: total.moments() for kind, total in sums.items()})


def _agree(view: Tower, source: UnitSource, kinds: tuple[str, ...], placement: str) -> None:
    """Raises ValueError unless all processes fit bases of the same tower and kinds,
    from the same cache if from one."""
    cache = None if source.ids is None else (source.count, int(source.ids.sum()))
    asked = {"tower": towers.checksum(view.module), "kinds": kinds, "placement": placement, "cache": cache}
    everyone = distributed.gather(asked)
    different = [name for name in asked if any(other[name] != everyone[0][name] for other in everyone)]
    if different:
        raise ValueError(f"all processes must fit bases of the same {' and '.join(different)}; they differ")


def _check_count(count: int, what: str) -> None:
    count = sum(distributed.gather(count))
    if count < 2:
        raise ValueError(f"bases need at least 2 {what} to have a covariance; the loader gave {count}")


def _shell(view: Tower, **more) -> SpectralBases:
    return SpectralBases(
        layout=view.layout,
        dim=view.dim,
        width=view.width,
        tower=view.name,
        checksum=towers.checksum(view.module),
        count=0,
        parts={},
        **more,
    )


def _fit_in_stream(view: Tower, source: UnitSource, kinds, tokens: str, progress) -> SpectralBases:
    """Bases of every head in model width, over tokens."""
    if kinds != ("head",):
        raise ValueError(f'placement="stream" adapts heads; leave kinds out (got {kinds})')
    if source.indexed:
        raise ValueError(
            "a cache keeps units at the pooled token alone; bases in the stream are fitted over tokens, "
            "so give a loader of images"
        )
    _agree(view, source, kinds, "stream")
    sums = StreamMoments(view, tokens)
    for batch in source.batches():
        with torch.no_grad():
            view.terms(batch.pixels, (), sums, every_token=tokens != "class")
        if progress is not None:
            progress(len(batch))
    _check_count(sums.count, "tokens")
    return from_moments(_shell(view, placement="stream", tokens=tokens), {"head": sums.moments()})
