"""What ends a run because it went wrong, or warns: losses and weights that are not finite, and step sizes too large."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from sdnet.train.checkpoint import TrainState
from sdnet.train.errors import NonFiniteLossError
from sdnet.train.metrics import LossMeter, LossReading
from sdnet.train.run_folder import RunFolder
from sdnet.train.step_sizes import DIVERGENCE


class Guard:
    """The checks of a running training; those of the loss and of the weights make the host wait for the device.

    Args:
        run: The run folder, for messages.
        model: The model.
        meter: The training losses.
        state: Where the run stands.
        say: Receives a warning as one sentence.
    """

    def __init__(
        self, run: RunFolder, model: nn.Module, meter: LossMeter, state: TrainState, say: Callable[[str], None]
    ) -> None:
        self.run, self.model, self.meter, self.state, self.say = run, model, meter, state, say
        self._warned_of_margin = False

    def loss(self) -> LossReading:
        """Return the mean losses.

        Raises:
            NonFiniteLossError: A loss of the epoch was not finite.
        """
        reading = self.meter.read()
        if reading.bad_step is not None:
            raise self._not_finite("The training loss", f"at step {reading.bad_step + 1}")
        return reading

    def check_weights(self) -> None:
        """Check the weights.

        Raises:
            NonFiniteLossError: Some weights are not finite.
        """
        names, values = zip(*self.model.named_parameters(), strict=True)
        finite = torch.stack([value.isfinite().all() for value in values]).tolist()
        if not all(finite):
            raise self._not_finite(names[finite.index(False)], f"after step {self.state.step}")

    def check_scores(self, scores: Mapping[str, float]) -> None:
        """Check the scores of an evaluation.

        Raises:
            NonFiniteLossError: A loss is not finite.
        """
        for name, value in scores.items():
            if not math.isfinite(value):
                what = "The validation loss" if name == "val_loss" else "The loss of the held-out images"
                raise self._not_finite(what, f"after step {self.state.step}")

    def check_margins(self, margins: Mapping[str, float]) -> dict[str, float]:
        """Warn, once in a run, of a step size with which FISTA can diverge.

        Args:
            margins: Step size times largest eigenvalue, by layer.

        Returns:
            The largest one as an entry of the log; nothing for a model without CSC layers.
        """
        if not margins:
            return {}
        name = max(margins, key=lambda name: margins[name])
        if margins[name] > DIVERGENCE and not self._warned_of_margin:
            self._warned_of_margin = True
            self.say(
                f"Warning: step size x eigenvalue of {name} is {margins[name]:.2f} after step {self.state.step}; "
                "FISTA can diverge above 4/3: lower --lr or raise --warmup-epochs."
            )
        return {"step_margin": margins[name]}

    def _not_finite(self, what: str, when: str) -> NonFiniteLossError:
        file = self.run.checkpoint_file
        kept = f"the last good checkpoint is {file}" if file.exists() else "no checkpoint had been written yet"
        return NonFiniteLossError(f"{what} became infinite or NaN {when}, in epoch {self.state.epoch + 1}; {kept}.")
