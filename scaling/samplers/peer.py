"""devinterp 1.3.2's SGLD and RMSprop-SGLD on one deep linear teacher: run by ``teachers.py`` in the peer's environment.

    python peer.py WORK.npz STEP_SIZE STEPS BATCH

One chain, the first 90 % dropped, localization 1, nbeta = n / log n. RMSprop-SGLD has a step size of its own, the best
of a sweep over four decades on type B and C teachers outside the study. Prints one JSON line.
"""

import json
import math
import sys
import time
import warnings

warnings.filterwarnings("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from devinterp.optim import SGMCMC  # noqa: E402
from devinterp.slt.llc import LLCEstimator  # noqa: E402
from devinterp.slt.sampler import sample  # noqa: E402
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler  # noqa: E402

RMSPROP_STEP = 3e-8


class Rows(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class WholeBatches(DataLoader):
    """Indexes a batch at once: the fastest that the peer's loop allows."""

    batch_size = property(lambda self: self.size, lambda self, value: None)

    def __init__(self, data, size):
        self.size = size
        super().__init__(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), size, True))


def main() -> None:
    path, step_size, steps, batch = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rmsprop_step = float(sys.argv[5]) if len(sys.argv) > 5 else RMSPROP_STEP
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = list(np.load(path).values())
    x, y = (torch.from_numpy(a) for a in work[:2])
    layers = [torch.nn.Linear(*w.shape, bias=False) for w in work[2:]]
    for layer, weight in zip(layers, work[2:], strict=True):
        layer.weight.data = torch.from_numpy(weight.T.copy())
    model, nbeta = torch.nn.Sequential(*layers), len(x) / math.log(len(x))

    def evaluate(model, data):
        return ((model(data[0]) - data[1]) ** 2).mean()

    rows = Rows(x, y)
    found = {}
    for name, method, step in (
        ("sgld", SGMCMC.sgld, step_size),
        ("rmsprop", SGMCMC.rmsprop_sgld, rmsprop_step),
    ):
        began = time.monotonic()
        estimator = LLCEstimator(num_chains=1, num_draws=steps // 10, nbeta=nbeta, init_loss=0.0)
        options = {"lr": step, "localization": 1.0, "nbeta": nbeta}
        try:
            sample(
                model, WholeBatches(rows, batch), evaluate=evaluate, sampling_method=method, optimizer_kwargs=options,
                num_chains=1, num_draws=steps // 10, num_burnin_steps=9 * steps // 10, callbacks=[estimator],
                verbose=False, seed=0, init_loss=0.0,
            )  # fmt: skip
            llc = float(estimator.get_results()["llc/mean"])
        except Exception as error:
            print(error, file=sys.stderr)
            llc = None
        llc = llc if llc is not None and math.isfinite(llc) else None
        found[name] = {"llc": llc, "step_size": step, "gradients": steps, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
