"""What MLflow runs of a registered guide: prompts in, images out.

MLflow copies this file and `pnp_core` into the version and runs them from there ("models from
code"), so nothing is unpickled and no checkout is needed; torch, diffusers, transformers,
accelerate and peft are.
"""

import base64
import io
import os
import threading
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

BASE = "PNP_GUIDE_BASE"  # where the base is, if not where it was when the guide was registered
NUM_OPEN = 2  # pipelines that are kept in memory


class ServedGuide(PythonModel):
    """A bundle of guides, plugged into whichever pipeline is asked for."""

    def load_context(self, context: Any) -> None:
        """Open the bundle. Raises ImportError, ValueError if it can't be."""
        try:
            import torch

            from pnp_core.bundle import GuideBundle
        except ImportError as error:
            raise ImportError(
                f"a guide needs torch, diffusers, transformers, accelerate and peft ({error}): "
                "pip install -r requirements.txt of this version"
            ) from error
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bundle = GuideBundle.load(Path(__file__).parent)
        config: dict[str, Any] = dict(context.model_config or {})
        self._base = config.get("base", "")
        self._scale = config.get("guidance_scale", 3.0)  # versions before this was written
        self._open: dict[tuple[str, str], Any] = {}
        # MLflow answers requests in threads, and plugging and scheduler are the pipeline's state.
        self._one_at_a_time = threading.Lock()

    def predict(  # type: ignore[no-untyped-def] # MLflow would take a hint for a schema
        self,
        context,  # noqa: ARG002
        model_input,
        params=None,
    ):
        """An image for each prompt, as the base64 text of a PNG.

        Args:
            context: MLflow's.
            model_input: prompts: a list, or a table whose first column they are.
            params: by name, each optional: `base` and `model` (paths; the model is a fine-tune),
                `negative_prompt`, `guidance_scale` (without it the one that the guide was
                evaluated at), `num_steps`, `seed` (of the first prompt; the
                next have the next), `strength`.

        Raises ValueError if base or model can't be opened or don't fit the guide.
        """
        with self._one_at_a_time:
            return self._images(_prompts(model_input), params or {})

    def _images(self, prompts: list[str], asked: dict[str, Any]) -> list[str]:
        import torch

        pipe = self._pipeline(asked)
        num_steps = int(asked.get("num_steps") or self._bundle.default_num_steps)
        if best := self._bundle.scheduler_for(num_steps):
            best.set(pipe)
        images = []
        for number, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(int(asked.get("seed", 0)) + number)
            (image,) = pipe(
                prompt,
                negative_prompt=asked.get("negative_prompt") or None,
                num_inference_steps=num_steps,
                guidance_scale=float(asked.get("guidance_scale", self._scale)),
                generator=generator,
            ).images
            file = io.BytesIO()
            image.save(file, "PNG")
            images.append(base64.b64encode(file.getvalue()).decode("ascii"))
        return images

    def _pipeline(self, asked: dict[str, Any]) -> Any:
        """The pipeline of a base or fine-tune with the guide in it, opened once."""
        from pnp_core.fine_tunes import load_model
        from pnp_core.model_files import configs_of
        from pnp_core.models import load_pipeline
        from pnp_core.plug import plug, unplug

        base = asked.get("base") or os.environ.get(BASE) or self._base
        if not base:
            raise ValueError(f"which base? Name it as params={{'base': …}}, or set {BASE}")
        model = asked.get("model") or base
        pipe = self._open.pop((base, model), None)
        if pipe is None:
            try:
                pipe = load_pipeline(base, device=self._device)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"the base {base} can't be opened here ({error}): name where it is as "
                    f"params={{'base': …}}, or set {BASE}"
                ) from error
            if model != base:
                pipe = load_model(model, base=pipe, configs=configs_of(base))
        else:
            unplug(pipe)
        plug(pipe, self._bundle, strength=float(asked.get("strength", 1.0)))
        self._open[base, model] = pipe
        while len(self._open) > NUM_OPEN:
            self._open.pop(next(iter(self._open)))
        return pipe


def _prompts(model_input: Any) -> list[str]:
    """Raises ValueError if there is no prompt."""
    if hasattr(model_input, "iloc"):  # a table of pandas'
        model_input = model_input["prompt"] if "prompt" in model_input else model_input.iloc[:, 0]
    prompts = [model_input] if isinstance(model_input, str) else [str(x) for x in model_input]
    if not prompts:
        raise ValueError("there is no prompt")
    return prompts


set_model(ServedGuide())
