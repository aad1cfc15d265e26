"""The training loop over loaders, a model and Accelerate; without a host sync except where it reports."""

import json
import sys
from collections.abc import Callable
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor, nn

import sdnet
from sdnet.step_size import csc_layers
from sdnet.train.bad_images import noting_broken_image, record_bad_images
from sdnet.train.build import check_recipe, equal_facts, make_accelerator, make_model
from sdnet.train.checkpoint import Checkpoint, LoaderPosition, RandomState, TrainState, restore
from sdnet.train.data.loader import Data, Loader, Rank
from sdnet.train.data.watch import listening
from sdnet.train.disk_space import check_disk_space
from sdnet.train.ema import Ema
from sdnet.train.environment import describe_environment
from sdnet.train.errors import UserError
from sdnet.train.execution import execution
from sdnet.train.guards import Guard
from sdnet.train.init_from import Initial, freeze, initialise, read_initial
from sdnet.train.interrupt import Interrupt
from sdnet.train.job import Job
from sdnet.train.lock import RunLock
from sdnet.train.metrics import LossMeter, evaluate
from sdnet.train.optimizer import make_optimizer
from sdnet.train.outcome import by_weights, describe_outcome, describe_scores
from sdnet.train.progress import Display, Stopwatch, peak_memory
from sdnet.train.ranks import check_equal, naming_lost_process, on_all, on_main, set_timeout
from sdnet.train.reports import layer_scalars, summary
from sdnet.train.saving import Digests, Saver
from sdnet.train.schedule import learning_rate
from sdnet.train.step_sizes import converge_step_sizes, measured_margins
from sdnet.train.stopping import Agreement
from sdnet.train.trackers import check_trackers, start_trackers
from sdnet.train.verdicts import Verdicts
from sdnet.weights import model_facts

OpenData = Callable[[Job, Rank, torch.device], Data]


class Trainer:
    """One run in one process, from its first step or from its last checkpoint.

    An epoch is `steps_per_epoch` optimizer steps of `accumulate` batches; the batches that are left over are dropped.
    `saver` holds the parts that a checkpoint stores, and writes them.

    Args:
        job: What to run and where.
        open_data: Returns the loaders of this process.

    Raises:
        UserError: The recipe, the data, the launch and the checkpoint to resume do not fit together.
    """

    def __init__(self, job: Job, open_data: OpenData) -> None:
        self.job, self.run, self.verdicts = job, job.run, Verdicts()
        check_trackers(job)
        self.verdicts.find(job)  # before this process uses the GPU
        self.accelerator = make_accelerator(job.recipe, job.run)
        self.display = Display(active=self.accelerator.is_main_process, clock=True)
        check_recipe(job.recipe, self.accelerator)
        self.lock = RunLock(self.run.path)
        on_main(self.accelerator, self.lock.acquire)
        try:
            self._build(open_data)
        except BaseException:
            self.lock.release()
            raise

    def _build(self, open_data: OpenData) -> None:
        """Open the data, make the model, and restore the checkpoint if the run is resumed."""
        job, recipe, accelerator = self.job, self.job.recipe, self.accelerator
        on_main(accelerator, lambda: check_disk_space(self.run, recipe, job.resume))
        checkpoint, fallen_back = on_all(accelerator, lambda: self.run.checkpoint_of(job.resume))
        self.fallen_back = bool(fallen_back)
        check_equal(accelerator, equal_facts(job, checkpoint))
        if checkpoint:
            checkpoint.check_processes(accelerator.num_processes)
        initial = None if checkpoint else on_all(accelerator, lambda: read_initial(recipe))
        digests = self._open_data(open_data, checkpoint)
        begun = self._make_model(initial)
        self.meter, self.state = LossMeter(accelerator.device), TrainState()
        self.guard = Guard(self.run, self.model, self.meter, self.state, self.display.say)
        self.saver = self._make_saver(digests)
        self.notes = job.notes + fallen_back + begun + self.data.notes + self.verdicts.notes + self._restore(checkpoint)
        self.agreement = Agreement(accelerator.num_processes, job.timeout)
        set_timeout(job.timeout)
        self.interrupt, self.watch, self.first_batch = Interrupt(), Stopwatch(), self.state.batch
        self.display.set_length(recipe.epochs * self.steps_per_epoch, self.state.step)

    def _open_data(self, open_data: OpenData, checkpoint: Checkpoint | None) -> Digests:
        """Open the loaders, and return fingerprints of the data: equal on all processes, and those of a resumed run."""
        job, accelerator = self.job, self.accelerator
        rank = Rank(accelerator.process_index, accelerator.num_processes)
        # The first process of a machine goes first: the others reuse what it has found out about the files.
        with self.display.phase("reading the data"), listening(self.display.tell):
            self.data = on_all(accelerator, lambda: open_data(job, rank, accelerator.device), first=True)
        digests = Digests(self.data.digest, self.data.val_digest)
        check_equal(accelerator, {"the training set": digests.train, "the validation set": digests.val})
        if checkpoint:
            checkpoint.check_data(*digests)
        self.steps_per_epoch = len(self.data.train) // job.recipe.accumulate
        if not self.steps_per_epoch:
            raise UserError(f"The training set is smaller than one batch of {job.recipe.batch}.")
        return digests

    def _make_model(self, initial: Initial | None) -> tuple[str, ...]:
        """Make the model and the optimizer, and return what is said about the weights that the run begins with."""
        recipe, device = self.job.recipe, self.accelerator.device
        with self.display.phase(f"building {recipe.model}"), execution(recipe):
            self.model = make_model(recipe, len(self.data.classes), device)
        begun = initialise(self.model, initial, self.data.classes) if initial else ()
        self.frozen = freeze(self.model, recipe.freeze)
        self.ema = Ema(self.model, recipe.ema) if recipe.ema else None
        optimizer = make_optimizer(recipe, self.model)
        if any(layer.weight.requires_grad for layer in csc_layers(self.model).values()):
            sdnet.attach(self.model, optimizer)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.gradient_norm = torch.zeros((), device=device)
        return begun

    def _make_saver(self, digests: Digests) -> Saver:
        """Return what stores the parts of a checkpoint: those that all processes share, and those of this one."""
        facts = model_facts(self.model.config, self.data.classes) | {
            "recipe": json.dumps(self.job.recipe.to_json()),
            "program": self.data.program,
        }
        saver = Saver(self.job, self.accelerator, self.state, digests, facts)
        saver.models["last"] = self.model
        saver.shared |= {"model": self.model, "optimizer": self.optimizer, "verdicts": self.verdicts}
        if self.ema:
            saver.models["last_ema"] = saver.shared["ema"] = self.ema
        if self.accelerator.scaler:
            saver.shared["scaler"] = self.accelerator.scaler
        saver.own |= {
            "loader": LoaderPosition(self.data.train, self.state),
            "meter": self.meter,
            "random": RandomState(self.accelerator.device),
        }
        return saver

    def _restore(self, checkpoint: Checkpoint | None) -> tuple[str, ...]:
        """Restore the checkpoint of a resumed run, apply the changes of the recipe, and return what is said of both."""
        notes: tuple[str, ...] = ()
        settings_of_groups = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        if checkpoint:
            file = self.run.checkpoint_file
            shared = dict(checkpoint.shared)
            if "scaler" not in self.saver.shared:
                shared.pop("scaler", None)  # --override mixed_precision=bf16
            notes += restore(self.saver.shared, shared, file)
            notes += restore(self.saver.own, checkpoint.ranks[self.accelerator.process_index], file)
            notes += self.run.missing_metrics(self.state.epoch)
            if self.ema and "ema" not in checkpoint.shared:  # --override ema=...
                self.ema.restart(self.model)
        if changes := self.job.changes:
            for group, settings in zip(self.optimizer.param_groups, settings_of_groups, strict=True):
                group.update(settings)  # those of the checkpoint are from before the change
            notes += (f"Changed from step {self.state.step} on; {'; '.join(changes)}.",)
        return notes

    def train(self) -> None:
        """Run to the last epoch.

        Raises:
            NonFiniteLossError: A loss or a weight is not finite; the last checkpoint is from before.
            LostProcessError: Another process of the run has ended or does not answer.
            SystemExit: After one of `interrupt.SIGNALS`, with a checkpoint written; the code is 128 + the signal.
        """
        kept = f"the last checkpoint is {self.run.checkpoint_file}"
        with (
            self.lock,
            noting_broken_image(self.run, self.job.data, self.state),
            naming_lost_process(self.accelerator, self.job.timeout, kept),
        ):
            self._train()

    def _train(self) -> None:
        self._open_run()
        with self.interrupt, self.display, execution(self.job.recipe, self.display.say):
            if self.accelerator.is_main_process:
                self._say_what_runs()
            while not self._finished():
                self._train_epoch()
                self._finish_epoch()
            if self.state.epoch < self.job.recipe.epochs:
                waited = self.job.recipe.early_stop
                epochs = f"{waited} epoch{'s' * (waited > 1)}"
                self.display.say(f"Training ended after epoch {self.state.epoch}: {epochs} without a better top-1.")
            if self.accelerator.is_main_process:
                self.display.say(f"Done: {describe_outcome(self.run.metrics())}; the run folder is {self.run.path}")
        self.accelerator.end_training()

    def _say_what_runs(self) -> None:
        for line in (
            *summary(self.job.recipe, self.model, self.data, self.accelerator, self.steps_per_epoch),
            *self.notes,
        ):
            self.display.say(line)

    def _finished(self) -> bool:
        """Return whether all epochs are done, or too many went by without a better top-1."""
        state, recipe = self.state, self.job.recipe
        return state.epoch >= recipe.epochs or 0 < recipe.early_stop <= state.epoch - state.best_epoch

    def _train_epoch(self) -> None:
        """Train on the batches of the epoch that are left."""
        recipe, accelerator, state = self.job.recipe, self.accelerator, self.state
        self.model.train()
        for part in self.frozen:
            part.eval()  # the statistics of batch norm stay too
        self.watch, self.first_batch = Stopwatch(), state.batch
        left = max(0, self.steps_per_epoch * recipe.accumulate - state.batch)
        for images, labels in self.watch.timed(islice(self.data.train, left)):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, state.step, self.steps_per_epoch)
            with accelerator.accumulate(self.wrapped):
                loss = F.cross_entropy(self.wrapped(images), labels, label_smoothing=recipe.label_smoothing)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self._treat_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.meter.update(loss.detach(), len(labels), state.step)
            state.batch += 1
            if accelerator.sync_gradients:
                if self.ema:
                    self.ema.update(state.step)
                state.step += 1
                if state.step % self.job.log_every == 0:
                    self._report(images)
                signal, due = self.agreement.after_step(self.interrupt.signal, self.saver.due())
                if signal:
                    self._stop(signal)
                if due and state.batch < self.steps_per_epoch * recipe.accumulate:
                    self._checkpoint()

    def _treat_gradients(self) -> None:
        """Clip the gradients of a step; note their norm, on the device, where the recipe clips or a report follows."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self.job.recipe.clip_norm:
            norm = self.accelerator.clip_grad_norm_(parameters, self.job.recipe.clip_norm)
        elif (self.state.step + 1) % self.job.log_every == 0:
            self.accelerator.unscale_gradients(self.optimizer)
            norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        else:
            return
        self.gradient_norm = cast(Tensor, norm).detach()

    def _finish_epoch(self) -> None:
        """Converge the step sizes, evaluate, save, and prepare the next epoch."""
        state, recipe = self.state, self.job.recipe
        loss = self.guard.loss().epoch
        speed, wait = self._speed(), self.watch.wait_share
        self.guard.check_weights()
        margin = self.guard.check_margins(converge_step_sizes(self.model))
        if self.accelerator.num_processes > 1:  # batch norm's statistics differ between ranks: those of rank 0 count
            broadcast([*self.model.buffers(), *(self.ema.model.buffers() if self.ema else ())])
        evaluated = (state.epoch + 1) % recipe.eval_every == 0 or state.epoch + 1 == recipe.epochs
        scores = self._evaluate() if evaluated else {}
        state.epoch, state.batch = state.epoch + 1, 0
        self.meter.reset()
        self.data.train.set_epoch(state.epoch)
        rate = self.optimizer.param_groups[0]["lr"]
        facts = {"train_loss": loss, **scores, **margin}
        self.accelerator.log({f"epoch/{key}": value for key, value in facts.items()}, state.step)
        if self.accelerator.is_main_process:
            facts |= {"images_per_second": speed, "data_wait": wait}
            with self.run.writing():
                self.run.add_metrics({"epoch": state.epoch, "step": state.step, "lr": rate, **facts})
        words = [f"epoch {state.epoch}/{recipe.epochs}", f"train loss {loss:.3f}", *describe_scores(scores)]
        self.display.say("  ".join([*words, f"{speed:.0f} images/s"]))
        self.saver.save(by_weights(scores), state.note_best(scores))
        if state.epoch < recipe.epochs and (signal := self.agreement.now(self.interrupt.signal)):
            self._stop(signal, saved=True)

    def _evaluate(self) -> dict[str, float]:
        """Return the scores of the validation set and of the held-out images, if there are any.

        Those of the averaged weights begin with `ema_`.

        Raises:
            NonFiniteLossError: A loss is not finite.
        """
        scores = self._scores_of(self.model)
        if self.ema:
            with self.ema.projected() as averaged:
                scores |= {f"ema_{name}": value for name, value in self._scores_of(averaged).items()}
        return scores

    def _scores_of(self, model: nn.Module) -> dict[str, float]:
        data, device = self.data, self.accelerator.device
        with self.accelerator.autocast():
            scores = evaluate(model, self._shown(data.val, "validation"), data.val_size, device)
            if data.holdout:
                held = evaluate(model, self._shown(data.holdout, "held-out"), data.holdout_size, device)
                scores |= {name.replace("val_", "holdout_"): value for name, value in held.items()}
        self.guard.check_scores(scores)
        return scores

    def _shown(self, loader: Loader, images: str) -> Loader:
        """Return the batches of a loader, counted by the display."""
        return cast(Loader, self.display.counted(f"evaluating {images} images, batch", loader, len(loader)))

    def _speed(self) -> float:
        """Return the training images per second of all ranks in this epoch."""
        count = (self.state.batch - self.first_batch) * self.job.recipe.batch / self.job.recipe.accumulate
        return count / self.watch.elapsed

    def _report(self, images: Tensor) -> None:
        """Show and log where the run stands; a few host syncs."""
        loss, rate, step = self.guard.loss().recent, self.optimizer.param_groups[0]["lr"], self.state.step
        speed, wait, memory = self._speed(), self.watch.wait_share, peak_memory(self.accelerator.device)
        if self.accelerator.is_main_process:  # the layers of all ranks are equal
            facts = {"loss": loss, "lr": rate, **self.guard.check_margins(measured_margins(self.model))}
            facts |= {"images_per_second": speed, "data_wait": wait, "memory_gb": memory}
            facts |= layer_scalars(self.model, images, self.gradient_norm)
            self.accelerator.log({f"train/{name}": value for name, value in facts.items()}, step)
        self.display.show(
            step,
            f"epoch {self.state.epoch + 1}  loss {loss:.3f}  lr {rate:.2g}  {speed:.0f} images/s  "
            f"waiting for data {wait:.0%}  {memory:.1f} GB",
        )

    def _checkpoint(self) -> None:
        """Save within an epoch.

        Training continues from the step sizes as they are, so that a resumed run equals an uninterrupted one; only the
        exported weights have converged ones.
        """
        self.guard.loss()
        self.guard.check_weights()
        self.saver.save()

    def _stop(self, signal: int, saved: bool = False) -> None:
        """Save, unless that is done, and leave."""
        if not saved:
            self._checkpoint()
        self.accelerator.end_training()
        where = f"in epoch {self.state.epoch + 1} at step {self.state.step}"
        self.display.say(f"Stopped {where}; go on with --resume {self.run.path}")
        raise SystemExit(128 + signal)

    def _open_run(self) -> None:
        """Write what is known before the first step, and remove the metrics of epochs that will be run again."""

        def write() -> None:
            self.run.create(self.job.recipe, self.model.config, self.data.classes)
            self.display.log_to(self.run.log_file)
            if self.fallen_back:
                self.run.set_aside_damaged()
            if self.job.resume:
                self.notes += self.run.set_aside_later(self.state.step)
            self.run.keep_metrics(self.state.epoch)
            record_bad_images(self.run, self.data, self.job.resume, self.state.step)
            place = {"epoch": self.state.epoch, "step": self.state.step, "changes": self.job.changes}
            facts = {"command": sys.argv, "processes": self.accelerator.num_processes, **place}
            self.run.add_environment(facts | describe_environment(self.accelerator.device))

        self.saver.on_main(write)
        if self.job.resume and not self.job.changes:  # changed settings did not reach the scores of the checkpoint
            self.saver.export()
        start_trackers(self.accelerator, self.job, self.state.step)
