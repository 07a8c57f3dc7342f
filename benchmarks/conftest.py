"""What pytest collects here on a machine that has not all that the scripts need."""

from importlib.util import find_spec

NEEDS = {
    "bench_analysis.py": ("open_clip",),
    "bench_convex.py": ("open_clip", "sklearn"),
    "bench_fit.py": ("open_clip", "schedulefree"),
    "bench_peers.py": ("open_clip", "sklearn"),
    "bench_scale.py": ("open_clip",),
}
collect_ignore = [file for file, packages in NEEDS.items() if not all(map(find_spec, packages))]
