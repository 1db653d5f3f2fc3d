"""Training: a pure step, many steps as one compiled call, and a host loop over such calls. Each
level is usable alone.
"""

from jaxnet.train.averages import averaged, averaged_params
from jaxnet.train.cache import compile_cache
from jaxnet.train.diagnose import NonFiniteError
from jaxnet.train.evaluation import evaluate
from jaxnet.train.fitting import fit
from jaxnet.train.groups import by_path, freeze
from jaxnet.train.guard import guarded
from jaxnet.train.loop import train_epoch, train_steps
from jaxnet.train.members import many
from jaxnet.train.order import balanced, shuffle, shuffled
from jaxnet.train.pairs import all_pairs
from jaxnet.train.plot import plot_history
from jaxnet.train.results import Best, Result
from jaxnet.train.rules import early_stopping, time_budget
from jaxnet.train.state import TrainState, sgd
from jaxnet.train.step import augmented, train_step
from jaxnet.train.weighted import Weighted
from jaxnet.train.writers import write_csv, write_jsonl

__all__ = [
    "Best",
    "NonFiniteError",
    "Result",
    "TrainState",
    "Weighted",
    "all_pairs",
    "augmented",
    "averaged",
    "averaged_params",
    "balanced",
    "by_path",
    "compile_cache",
    "early_stopping",
    "evaluate",
    "fit",
    "freeze",
    "guarded",
    "many",
    "plot_history",
    "sgd",
    "shuffle",
    "shuffled",
    "time_budget",
    "train_epoch",
    "train_step",
    "train_steps",
    "write_csv",
    "write_jsonl",
]
