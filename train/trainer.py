"""The training loop over loaders, a model and Accelerate; no host sync except where it reports."""

import math
import os
import sys
from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

import sdnet
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.data.loader import Data, Rank
from sdnet.train.environment import describe_environment
from sdnet.train.errors import NonFiniteLossError, UserError
from sdnet.train.interrupt import Interrupt
from sdnet.train.job import Job
from sdnet.train.metrics import LossMeter, LossReading, evaluate, of_all_ranks
from sdnet.train.progress import Display, Stopwatch, peak_memory
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder
from sdnet.train.schedule import learning_rate

OpenData = Callable[[Job, Rank, torch.device], Data]


class Trainer:
    """One run on one rank, from its first step or from its last checkpoint.

    `epoch` and `batch` count what is done: whole epochs, and batches of the running one; `step` counts optimiser
    steps of the whole run. An epoch is `steps_per_epoch` steps of `accumulate` batches; what is left over is dropped.

    Args:
        job: what to run and where.
        open_data: makes this rank's loaders.

    Raises:
        UserError: the recipe, the data, the launch or the checkpoint to resume do not fit together.
    """

    def __init__(self, job: Job, open_data: OpenData) -> None:
        self.job, self.run, recipe = job, job.run, job.recipe
        self.accelerator = make_accelerator(recipe, job.run)
        rank = Rank(self.accelerator.process_index, self.accelerator.num_processes)
        with self.accelerator.local_main_process_first():  # the others find what it has found out about the files
            self.data = open_data(job, rank, self.accelerator.device)
        if len(set(gather_object([self.data.digest]))) > 1:
            raise UserError("The processes do not see the same training pictures.")
        self.steps_per_epoch = len(self.data.train) // recipe.accumulate
        if not self.steps_per_epoch:
            raise UserError(f"The training set is smaller than one batch of {recipe.batch}.")

        self.model = make_model(recipe, len(self.data.classes), self.accelerator.device)
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        sdnet.attach(self.model, optimizer)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.meter = LossMeter(self.accelerator.device)
        self.epoch = self.batch = self.step = 0
        self.best_top1 = -1.0
        if job.resume:
            self._restore(Checkpoint.load(self.run.checkpoint_file))

    def train(self) -> None:
        """Run to the last epoch.

        Raises:
            NonFiniteLossError: the loss or the weights are not finite; the last checkpoint is from before.
            SystemExit: after Ctrl-C or SIGTERM, with a checkpoint written; the code is 128 + the signal.
        """
        total = self.job.recipe.epochs * self.steps_per_epoch
        self._open_run()
        with Interrupt() as self.interrupt, Display(total, self.step, self.accelerator.is_main_process) as self.display:
            for note in self.data.notes:
                self.display.say(note)
            while self.epoch < self.job.recipe.epochs:
                self._train_epoch()
                self._finish_epoch()
            self.display.say(f"Done: best top-1 {self.best_top1:.2f}%; the run folder is {self.run.path}")
        self.accelerator.end_training()

    def _train_epoch(self) -> None:
        """The batches of the epoch that are left."""
        recipe, accelerator, loader = self.job.recipe, self.accelerator, self.data.train
        self.model.train()
        self.watch, self.first_batch = Stopwatch(), self.batch
        left = self.steps_per_epoch * recipe.accumulate - self.batch
        for images, labels in self.watch.timed(islice(loader, left)):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, self.step, self.steps_per_epoch)
            with accelerator.accumulate(self.wrapped):
                loss = F.cross_entropy(self.wrapped(images), labels, label_smoothing=recipe.label_smoothing)
                accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.meter.update(loss.detach(), len(labels), self.step)
            self.batch += 1
            if accelerator.sync_gradients:
                self.step += 1
                if self.step % self.job.log_every == 0:
                    self._report()
                if signal := self._stop_signal():
                    self._stop(signal)

    def _finish_epoch(self) -> None:
        """Evaluate, note, save, and make ready for the next epoch."""
        loss = self._read_loss().epoch
        speed, wait = self._speed(), self.watch.wait_share
        if self.accelerator.num_processes > 1:
            broadcast(list(self.model.buffers()))  # batch norm's statistics differ between ranks: those of rank 0 count
        scores = evaluate(self.model, self.data.val, self.data.val_size, self.accelerator.device)
        if not math.isfinite(scores["val_loss"]):
            where = f"after step {self.step}, in epoch {self.epoch + 1}"
            raise NonFiniteLossError(f"The validation loss became infinite or NaN {where}; {self._last_good()}.")
        self.epoch, self.batch, self.meter = self.epoch + 1, 0, LossMeter(self.accelerator.device)
        self.data.train.set_epoch(self.epoch)
        rate = self.optimizer.param_groups[0]["lr"]
        self.accelerator.log({"epoch/train_loss": loss} | {f"epoch/{key}": scores[key] for key in scores}, self.step)
        if self.accelerator.is_main_process:
            facts = {"train_loss": loss, **scores, "images_per_second": speed, "data_wait": wait}
            self.run.add_metrics({"epoch": self.epoch, "step": self.step, "lr": rate, **facts})
        self.display.say(
            f"epoch {self.epoch}/{self.job.recipe.epochs}  train loss {loss:.3f}  val loss {scores['val_loss']:.3f}  "
            f"top-1 {scores['val_top1']:.2f}%  top-5 {scores['val_top5']:.2f}%  {speed:.0f} images/s"
        )
        best = scores["val_top1"] > self.best_top1
        self.best_top1 = max(self.best_top1, scores["val_top1"])
        self._save(["best", "last"] if best else ["last"])

    def _speed(self) -> float:
        """Training images per second of all ranks in this epoch."""
        count = (self.batch - self.first_batch) * self.job.recipe.batch / self.job.recipe.accumulate
        return count / self.watch.elapsed

    def _read_loss(self) -> LossReading:
        """Mean losses; a host sync.

        Raises:
            NonFiniteLossError: some loss of the epoch was not finite.
        """
        reading = self.meter.read()
        if reading.bad_step is not None:
            where = f"at step {reading.bad_step + 1}, in epoch {self.epoch + 1}"
            raise NonFiniteLossError(f"The training loss became infinite or NaN {where}; {self._last_good()}.")
        return reading

    def _report(self) -> None:
        """Show and log where the run stands; a host sync."""
        loss, rate = self._read_loss().recent, self.optimizer.param_groups[0]["lr"]
        self.accelerator.log({"train/loss": loss, "train/lr": rate}, self.step)
        self.display.show(
            self.step,
            f"epoch {self.epoch + 1}  loss {loss:.3f}  lr {rate:.2g}  {self._speed():.0f} images/s  "
            f"waiting for data {self.watch.wait_share:.0%}  {peak_memory(self.accelerator.device)}",
        )

    def _stop_signal(self) -> int:
        """The signal that asked to stop, or 0.

        It reaches ranks at different steps, so they agree where they report; a lone process stops at once.
        """
        if self.accelerator.num_processes == 1:
            return self.interrupt.signal
        if self.step % self.job.log_every:
            return 0
        return int(of_all_ranks(torch.tensor(self.interrupt.signal, device=self.accelerator.device)).max())

    def _stop(self, signal: int) -> None:
        """Save in the midst of an epoch and leave."""
        self._read_loss()
        self._save(["last"])
        self.accelerator.end_training()
        self.display.say(f"Stopped in epoch {self.epoch + 1} at step {self.step}; go on with --resume {self.run.path}")
        raise SystemExit(128 + signal)

    def _open_run(self) -> None:
        """Write what is known before the first step, and forget what the checkpoint does not know."""
        self.accelerator.wait_for_everyone()  # until all ranks have found the folder unused
        if self.accelerator.is_main_process:
            if not self.job.resume:
                self.run.create(self.job.recipe)
            self.run.keep_metrics(self.epoch)
            self.run.note_left_out(self.data.left_out)
            facts = {"command": sys.argv, "processes": self.accelerator.num_processes}
            self.run.add_environment(facts | describe_environment(self.accelerator.device))
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})

    def _save(self, names: list[str]) -> None:
        """Write the checkpoint and the weights under `names`.

        Raises:
            NonFiniteLossError: some weights are not finite; nothing is written.
        """
        weights = self.model.state_dict()
        if broken := [name for name, value in self.model.named_parameters() if not value.isfinite().all()]:
            where = f"after step {self.step}, in epoch {self.epoch + 1 if self.batch else self.epoch}"
            raise NonFiniteLossError(f"{broken[0]} became infinite or NaN {where}; {self._last_good()}.")
        ranks = gather_object([self._rank_state()])
        if not self.accelerator.is_main_process:
            return
        for name in names:
            facts = {"epoch": str(self.epoch), "step": str(self.step), "val_top1": f"{self.best_top1:.4f}"}
            self.run.save_weights(name, weights, facts)
        Checkpoint(
            epoch=self.epoch,
            batch=self.batch,
            step=self.step,
            best_top1=self.best_top1,
            data=self.data.digest,
            model=weights,
            optimizer=self.optimizer.state_dict(),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            ranks=ranks,
        ).save(self.run.checkpoint_file)

    def _rank_state(self) -> dict[str, torch.Tensor]:
        """What differs between ranks, on the CPU."""
        device = self.accelerator.device
        state = {"loader": self.data.train.state(), "meter": self.meter.state.cpu(), "cpu": torch.get_rng_state()}
        return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where the checkpoint was written."""
        checkpoint.check(self.data.digest, self.accelerator.num_processes)
        self.epoch, self.batch, self.step = checkpoint.epoch, checkpoint.batch, checkpoint.step
        self.best_top1 = checkpoint.best_top1
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        rank = checkpoint.ranks[self.accelerator.process_index]
        self.data.train.set_epoch(self.epoch)
        self.data.train.load_state(rank["loader"])
        self.meter.state.copy_(rank["meter"])
        torch.set_rng_state(rank["cpu"])
        if "cuda" in rank and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(rank["cuda"], self.accelerator.device)

    def _last_good(self) -> str:
        file = self.run.checkpoint_file
        return f"the last good checkpoint is {file}" if file.exists() else "no checkpoint had been written yet"


def make_accelerator(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Accelerate as the recipe asks for it.

    Raises:
        UserError: the launcher was told another precision or accumulation, or the device lacks the precision.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", recipe.mixed_precision):
        raise UserError(
            f"accelerate was launched with mixed precision {launched} but the recipe says {recipe.mixed_precision}: "
            f"pass --mixed-precision {launched} to the program instead."
        )
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulate,
            log_with="tensorboard",
            project_dir=run.path,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if recipe.mixed_precision != "no" and not accelerator.native_amp:  # Accelerate itself would train in fp32
        raise UserError(f"Mixed precision {recipe.mixed_precision} needs a GPU; this run has {accelerator.device}.")
    if accelerator.gradient_accumulation_steps != recipe.accumulate:
        steps = accelerator.gradient_accumulation_steps
        raise UserError(f"accelerate was launched with {steps} accumulation steps: pass --accumulate {steps} instead.")
    return accelerator


def make_model(recipe: Recipe, num_classes: int, device: torch.device) -> torch.nn.Module:
    """The seeded model of a recipe, on a device.

    Raises:
        UserError: an unknown model, or options that it does not take.
    """
    torch.manual_seed(recipe.seed)
    try:
        model = sdnet.create_model(
            recipe.model,
            num_classes,
            stem=recipe.stem,
            image_size=recipe.image_size,
            shortcut=recipe.shortcut,
            lam=recipe.lam,
            impl=recipe.impl,
            **vars(recipe.coding),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model.to(device)  # first, for the step sizes' convergence is work for the device
    sdnet.refresh_step_size(model)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if recipe.compile:
        model.compile()
    return model
