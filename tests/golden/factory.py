"""Fit the public IMPure to the interface of ``compare``: no second implementation, only names and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from impure_fast import Draws, IMPure, IMPureConfig
from impure_fast.draws import MixDraws, grid_of
from impure_fast.training.losses import guided_loss, pixel_loss

TABLES = ("pos_embed", "decoder_pos_embed", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
CHECKPOINTS = {
    *("index_pos", "ids_shuffle", "ids_restore", "embedded", "shuffled", "enc_block0", "enc_mix", "latent"),
    *("noised_image", "embedded_noise", "noise_latent", "head", "dec_in", "dec_block0", "dec_out"),
    *("assembled", "patches", "pred_raw"),
}


class GoldenModel:
    """One golden configuration round an IMPure."""

    def __init__(self, options: dict, state: dict[str, Tensor]) -> None:
        self.options = options
        self.pre_norm = options.get("pre_norm", True)
        self.config = IMPureConfig.from_official({**options, "pre_norm": True})
        dtype = next(v.dtype for k, v in state.items() if k not in TABLES)
        device = next(iter(state.values())).device
        self.model = IMPure(self.config).to(device, dtype).train(options["training"])
        self.model.load_state_dict(state)
        # The tables that the vector was made with.  One from seeds did not keep its schedule, and float32 roots differ
        # in their last bit between processors: there the model's own is compared.
        for name in TABLES[:2] if "seeds" in options else TABLES:
            if name in state:
                getattr(self.model, name).copy_(state[name])

    def named_parameters(self):
        return self.model.named_parameters()

    def _images(self, images: Tensor) -> Tensor:
        # Without pre_norm the release feeds [0, 1] values as if they were normalised.
        return images if self.pre_norm else self.model.unnormalise(images)

    def _draws(self, images: Tensor, given: dict[str, Tensor]) -> Draws:
        tensors = {}
        if "ids_shuffle" in given:
            tensors["order"] = given["ids_shuffle"].long()
        elif "perm_uniform" in given:
            tensors["order"] = given["perm_uniform"].argsort(dim=1, stable=True)
        if "pos_x" in given:
            tensors["positions"] = torch.stack((given["pos_y"], given["pos_x"]), dim=1).long()
        if "img_t" in given:
            tensors["image_step"] = given["img_t"].long()
        if "feat_t" in given:
            tensors["feature_step"] = given["feat_t"].long().T
        tensors |= {ours: given[theirs] for ours, theirs in NOISES if theirs in given}
        if "feature_noise" in tensors:
            tensors["feature_noise"] = tensors["feature_noise"].transpose(0, 1)
        draws = Draws.from_tensors(self.config, images.shape, **tensors)
        return draws.to(images.device)

    def reconstruct(self, images: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        images = self._images(images)
        prediction, kept = self.model.reconstruct(images, self._draws(images, given), keep=CHECKPOINTS)
        rows, cols, _ = grid_of(self.config, images.shape)
        return {**kept, "purified": self.model.to_image(prediction, rows, cols)}

    def losses(self, images, given, clean=None, guides=None, guide_weights=None) -> dict[str, Tensor]:
        images = self._images(images)
        clean = None if clean is None else self._images(clean)
        prediction, _ = self.model.reconstruct(images, self._draws(images, given))
        normed = self.options["norm_pix_loss"]
        terms = {"pix": pixel_loss(self.model, prediction, images, clean, normalise_target=normed)}
        if guides and clean is not None:
            mixing = None
            if self.options["mask_chunks"]:
                mixing = [
                    MixDraws(v.argsort(dim=1, stable=True), int(c), int(r))
                    for v, c, r in zip(given["mix_uniform"], given["mix_chunks"], given["mix_index"], strict=True)
                ]
            terms |= guided_loss(self.model, prediction, images, clean, guides, guide_weights, mixing, normed)
        return {"total": sum(terms.values()), **terms}


NOISES = (("image_noise", "img_noise"), ("feature_noise", "feat_noise"))


def golden_model(config: dict, state: dict[str, Tensor]) -> GoldenModel:
    """``compare``'s model factory; state with or without tables, the model takes its dtype and device."""
    return GoldenModel(config, state)
