"""Estimates with default settings beside exact values, as a Markdown table: ``python -m scaling.accuracy``.

About ten minutes on two cores. The problems are those of ``tests/targets.py``; nothing is given but the posterior and
the data. "exact" is the value of the very posterior that was sampled, by quadrature or in closed form; "truth" is the
learning coefficient. Where the multiplicity is above 1 the two differ by a power of 1 / log nbeta.
"""

import sys

import jax

import slt_jax as slt
from scaling.known_answers import TARGETS, Target


def row(target: Target) -> str:
    posterior = slt.LocalPosterior(target.loss_fn, target.center, target.num_data)
    result = slt.estimate_llc(posterior, target.data)
    settings = result.settings
    exact, z = "", ""
    if target.exact is not None:
        value = target.exact(settings.nbeta, settings.localization)
        exact, z = f"{value:.4g}", f"{(result.llc - value) / result.llc_stderr:+.1f}"
    error = result.llc / float(target.truth) - 1
    estimate = f"{result.llc:.4g} ± {result.llc_stderr:.2g}"
    name = target.name.replace("|", "\\|")
    cells = (name, target.truth, target.multiplicity, exact, estimate, z, f"{error:+.1%}", result.verdict)
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    print("| problem | truth | m | exact at this nbeta | estimate | z | estimate / truth - 1 | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for target in TARGETS:
        if len(sys.argv) == 1 or target.name in sys.argv[1:]:
            print(row(target), flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    main()
