"""A page to try the purifier: attack a classifier on one photograph, purify, see what either did.

``Trial`` computes, on pictures [1, 3, 224, 224] in [0, 1], the classifier's size; ``page`` shows it.  Nothing outside
this machine is asked for anything.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from .attacks import pgd
from .classifiers import LITE0_MEAN, LITE0_SIZE, LITE0_STD, Normalised, efficientnet_lite
from .config import NUM_STEPS, IMPureConfig
from .demo import NOTICE, SEED, decide, difference, photograph_files
from .engine import Engine
from .errors import ConfigError, Error, ImageFileError, InputError, needs_extra
from .images import read_image
from .model import IMPure
from .purify import to_bytes, to_float

MOST_CHUNKS = 16
WELCOME = "Drop a photograph first."


def possible_chunks(config: IMPureConfig) -> list[int]:
    """Every K up to MOST_CHUNKS that divides the patches of a tile."""
    found = []
    for chunks in range(2, MOST_CHUNKS + 1):
        with suppress(ConfigError):
            found.append(dataclasses.replace(config, num_chunks=chunks).num_chunks)
    return found


def with_chunks(model: IMPure, chunks: int) -> IMPure:
    """The model with another K.  Raises ConfigError unless K divides a tile's patches.

    Of the weights K changes only those of the replicas' heads, which take the class tokens of the K - 1 other chunks:
    under another K than they were trained with, every token takes its equal share of all of them.
    """
    if chunks == model.config.num_chunks:
        return model
    config = dataclasses.replace(model.config, num_chunks=chunks)
    state = model.state_dict()
    heads = state["decoder_head_embed.weight"].unflatten(1, (-1, config.embed_dim))  # [E, K - 1, D]
    state["decoder_head_embed.weight"] = heads.sum(dim=1).div(chunks - 1).repeat(1, chunks - 1)
    return IMPure.from_state(config, state, f"the model with K={chunks}")


class Trial:
    """A classifier, a purifier, and what can be done to a photograph between them."""

    def __init__(self, model: IMPure) -> None:
        self.classifier = Normalised(efficientnet_lite(0), LITE0_MEAN, LITE0_STD).eval()
        from timm.data import ImageNetInfo  # there, if the classifier is

        self.names = ImageNetInfo()
        self._engine = functools.lru_cache(maxsize=2)(lambda chunks: Engine(with_chunks(model, chunks)))

    def open(self, path: str | Path) -> tuple[Tensor, list[str]]:
        """The largest middle square of a photograph, scaled; and sentences about what was done to it or left out.

        Raises ImageFileError.
        """
        path = Path(path)
        try:
            picture = read_image(path)
        except ImageFileError as error:  # the folder is the server's, not the reader's
            raise ImageFileError(str(error).replace(str(path), path.name)) from error
        height, width = picture.rgb.shape[:2]
        notes = [f"{path.name}, {width} x {height}: its middle square, at the classifier's {LITE0_SIZE} pixels."]
        if min(height, width) < LITE0_SIZE:
            notes.append("It is smaller than that and was enlarged, which the classifier may not forgive.")
        if picture.alpha is not None:
            notes.append("Its transparency was dropped.")
        if picture.warning:
            notes.append(picture.warning.replace(str(path), path.name))
        square = ImageOps.fit(Image.fromarray(picture.rgb), (LITE0_SIZE, LITE0_SIZE), Image.Resampling.BICUBIC)
        return to_float(np.asarray(square)[None]), notes

    def attack(self, clean: Tensor, eps: float, steps: int) -> Tensor:
        """PGD away from what the classifier sees in the clean picture; eps in 1/255."""
        label = decide(self.classifier, clean).argmax(dim=1)
        return pgd(self.classifier, clean, label, eps=eps / 255, steps=steps, step_size=eps / 4 / 255, seed=SEED)

    def purify(self, image: Tensor, image_step: int, feature_step: int, chunks: int) -> Tensor:
        """The same draws at every call, so that only the sliders make a difference."""
        engine = self._engine(chunks)
        return engine.purify(image, seed=SEED, image_step=image_step, feature_step=feature_step)

    def confidences(self, image: Tensor, count: int = 3) -> dict[str, float]:
        """The classifier's most probable classes, best first."""
        best = decide(self.classifier, image)[0].softmax(dim=0).topk(count)
        names = (self.names.index_to_description(i).split(",")[0] for i in best.indices.tolist())
        return dict(zip(names, best.values.tolist(), strict=True))


def page(model: IMPure) -> Any:
    """The page as ``gradio.Blocks``, not yet launched.  Raises MissingExtraError without the extra ``app``."""
    with needs_extra("The page", "app"):
        import gradio as gr

    trial, config = Trial(model), model.config

    def shown(image: Tensor, clean: Tensor) -> list[Any]:
        """What a column shows of an image: itself, the classifier's word, the difference to the clean picture."""
        return [to_bytes(image)[0], trial.confidences(image), to_bytes(difference(image, clean))[0]]

    def opened(path: str | None) -> list[Any]:
        if path is None:
            return [WELCOME, *[None] * 10]
        try:
            clean, notes = trial.open(path)
        except Error as error:
            return [str(error), *[None] * 10]
        return [" ".join(notes), clean, None, *shown(clean, clean)[:2], *[None] * 6]

    def attacked(clean: Tensor | None, eps: float, steps: int) -> list[Any]:
        if clean is None:
            raise gr.Error(WELCOME, print_exception=False)
        adversarial = trial.attack(clean, eps, steps)
        return [adversarial, *shown(adversarial, clean), *[None] * 3]

    def purified(
        clean: Tensor | None, adversarial: Tensor | None, image_step: int, feature_step: int, chunks: int
    ) -> list[Any]:
        if clean is None:
            raise gr.Error(WELCOME, print_exception=False)
        image = clean if adversarial is None else adversarial
        return shown(trial.purify(image, image_step, feature_step, chunks), clean)

    def column(name: str) -> list[Any]:
        """The components that hold what ``shown`` gives."""
        options: dict[str, Any] = dict(format="png", interactive=False, height=260, buttons=["download", "fullscreen"])
        with gr.Column(min_width=220):
            image = gr.Image(label=name, **options)
            word = gr.Label(label=f"classifier, {name}", elem_id=f"label-{name}")
            found: list[Any] = [image, word]
            if name != "clean":
                found.append(gr.Image(label=f"{name} - clean, x 10", **options))
        return found

    # A photograph is deleted an hour after it came.
    with gr.Blocks(title="impure_fast", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# impure_fast\nAttack a photograph, purify it, and see what EfficientNet-Lite0 sees.  \n{NOTICE}")
        with gr.Row():
            with gr.Column(min_width=220):
                photograph = gr.File(label="photograph", height=140)
                gr.Examples([[str(path)] for path in photograph_files()], photograph)
            with gr.Column(min_width=220):
                eps = gr.Slider(1, 16, 8, step=1, label="eps, in 1/255")
                steps = gr.Slider(1, 50, 20, step=1, label="steps of PGD")
                attack = gr.Button("Attack", variant="stop")
            with gr.Column(min_width=220):
                levels: dict[str, Any] = dict(minimum=0, maximum=NUM_STEPS - 1, step=1)
                image_step = gr.Slider(value=config.image_step, label="image step", **levels)
                feature_step = gr.Slider(value=config.feature_step, label="feature step", **levels)
                trained = f"chunks K (trained with {config.num_chunks})"
                chunks = gr.Radio(possible_chunks(config), value=config.num_chunks, label=trained)
                purify = gr.Button("Purify", variant="primary")
        note = gr.Textbox(WELCOME, show_label=False, container=False, interactive=False, elem_id="note")
        with gr.Row():
            columns = [column(name) for name in ("clean", "adversarial", "purified")]
        clean, adversarial = gr.State(), gr.State()

        photograph.change(opened, photograph, [note, clean, adversarial, *chain(*columns)], api_name="open")
        attack.click(attacked, [clean, eps, steps], [adversarial, *columns[1], *columns[2]], api_name="attack")
        gr.on(
            [purify.click, image_step.release, feature_step.release, chunks.input],
            purified,
            [clean, adversarial, image_step, feature_step, chunks],
            columns[2],
            api_name="purify",
        )
    return blocks


def launch(model: IMPure, host: str = "127.0.0.1", port: int | None = None) -> tuple[Any, str]:
    """Serve the page beside the caller -> ``gradio.Blocks`` (``block_thread()`` waits for Ctrl-C, ``close()`` ends it),
    address.

    host: on which to listen; port: None takes a free one from 7860 on.  Raises MissingExtraError, or InputError for
    an address that cannot be had.
    """
    blocks = page(model)
    import gradio as gr

    options: dict[str, Any] = dict(share=False, ssr_mode=False, prevent_thread_lock=True, quiet=True)
    options |= dict(footer_links=[], run_history=False, enable_monitoring=False, max_file_size="64mb")
    # The default theme's fonts come from the web.
    options["theme"] = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = blocks.launch(server_name=host, server_port=port, **options)
    except OSError as error:
        raise InputError(f"{host}, port {port or 'from 7860 on'}: taken or not allowed; choose others.") from error
    return blocks, address
