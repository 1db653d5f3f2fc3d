"""Training: a pure step, many steps as one compiled call, and a host loop over those. Each level is usable alone."""

from jaxnet.train.fit import Result, evaluate, fit
from jaxnet.train.many import many
from jaxnet.train.plot import plot_history
from jaxnet.train.shuffle import shuffled
from jaxnet.train.step import TrainState, sgd, train_epoch, train_state, train_step, train_steps

__all__ = [
    "Result",
    "TrainState",
    "evaluate",
    "fit",
    "many",
    "plot_history",
    "sgd",
    "shuffled",
    "train_epoch",
    "train_state",
    "train_step",
    "train_steps",
]
