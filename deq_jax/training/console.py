"""What a person sees of a run: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping


class Console:
    """Progress and messages, on stderr."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        """Prepares the console; the bar appears with the first progress.

        Args:
          total: training steps in all.
          enabled: False on all processes but one.
        """
        self._total, self._enabled, self._bar = total, enabled, None
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Console:
        """Shows nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bar where it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """Shows a sentence.

        Args:
          text: without a final newline.
        """
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar.

        Args:
          step: the number of finished steps.
        """
        if not (self._enabled and self._is_terminal):
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=step, file=sys.stderr, dynamic_ncols=True)
        self._bar.update(step - self._bar.n)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of the last steps.

        Args:
          step: the number of finished steps.
          values: loss, steps_per_second, fwd_steps (NFE), unconverged, corrupt, skipped.
        """
        words = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        if "fwd_steps" in values:
            words.append(f"nfe {values['fwd_steps']:.1f}")
        if values.get("unconverged"):
            words.append(f"unconverged {values['unconverged']:.0%}")
        if values.get("corrupt"):
            words.append(f"corrupt records {values['corrupt']:.2%}")
        if values.get("skipped"):
            words.append(f"updates left out {values['skipped']:.0%}")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words))
        else:
            if speed := values.get("steps_per_second"):
                words.append(f"{speed:.2f} steps/s")
                left = datetime.timedelta(seconds=round((self._total - step) / speed))
                words.append(f"eta {left}")
            self.say(f"step {step}/{self._total}  {'  '.join(words)}")

    def show_evaluation(self, step: int, budget: int, values: Mapping[str, float]) -> None:
        """Shows the main evaluation.

        Args:
          step: the number of finished steps.
          budget: of the solver.
          values: metric -> number.
        """
        solver = ("fwd_steps", "fwd_residual", "unconverged")
        # "iou/road" and the like are for metrics.jsonl: one of each class would be a long line.
        shown = {n: v for n, v in values.items() if n not in solver and "/" not in n}
        words = [f"{name} {value:.4g}" for name, value in shown.items()]
        if "fwd_steps" in values:
            words.append(f"nfe {values['fwd_steps']:.1f} of {budget}")
            words.append(f"unconverged {values['unconverged']:.0%}")
        self.say(f"evaluation at step {step}:  {'  '.join(words)}")
