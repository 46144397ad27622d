"""The networks of `benchmarks.coverage`: where they come from, and what they are fed with."""

from __future__ import annotations

import argparse
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fxquant.errors import nearest

_MODELS = torchvision.models
_OF = {
    "classification": _MODELS.list_models(module=_MODELS),
    "segmentation": _MODELS.list_models(module=_MODELS.segmentation),
    "video": _MODELS.list_models(module=_MODELS.video),
    "flow": _MODELS.list_models(module=_MODELS.optical_flow),
    "detection": _MODELS.list_models(module=_MODELS.detection),
}
_SEVERAL = (nn.LayerNorm, nn.MultiheadAttention)
_IMAGES = 4

# Of timm one network, or the smallest few, of every family.
TIMM = (
    "mobilevit_xxs", "mobilevitv2_050", "tiny_vit_5m_224", "edgenext_xx_small",
    "tf_efficientnet_b0", "tf_mobilenetv3_small_100", "tf_efficientnetv2_b0", "dm_nfnet_f0",
    "nf_resnet26", "beit_base_patch16_224", "botnet26t_256", "halonet26t", "bat_resnext26ts",
    "gcresnext26ts", "cait_xxs24_224", "coat_lite_tiny", "convit_tiny", "convmixer_768_32",
    "convnext_atto", "convnextv2_atto", "crossvit_9_240", "cs3darknet_s", "cspnext_tiny",
    "davit_tiny", "deit_tiny_patch16_224", "deit3_small_patch16_224", "densenetblur121d", "dla34",
    "dpn48b", "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "efficientvit_b0",
    "efficientvit_m0", "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_100", "ghostnetv2_100", "hardcorenas_a",
    "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small", "inception_next_atto", "inception_v4",
    "lcnet_050", "levit_128s", "mambaout_femto", "coatnet_nano_rw_224", "maxvit_rmlp_pico_rw_256",
    "poolformer_s12", "caformer_s18", "mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224",
    "mnasnet_small", "mobilenetv4_conv_small", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "pit_ti_224", "pvt_v2_b0", "rdnet_tiny", "regnety_002", "repghostnet_050", "repvgg_a0",
    "repvit_m0_9", "res2net50_14w_8s", "resnest14d", "resnet10t", "resnetv2_18", "rexnet_100",
    "selecsls42b", "seresnext26t_32x4d", "sequencer2d_s", "skresnet18", "starnet_s1",
    "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small", "visformer_tiny",
    "vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "volo_d1_224", "ese_vovnet19b_dw",
    "legacy_xception", "xcit_nano_12_p16_224",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network by its spelling, `kind` is the key of torchvision's lists or timm."""

    spelling: str
    kind: str

    @property
    def name(self) -> str:
        return self.spelling.partition(":")[2]

    def warmed(self) -> nn.Module:
        """With random weights, and the statistics of one random batch."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self._timm() if self.kind == "timm" else self._torchvision()
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        if norms:
            with torch.no_grad():
                model(*self._several())
        for module in model.modules():
            # The head of torchvision's ViT starts at zero: every output would be equal.
            if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                nn.init.normal_(module.weight, 0, 0.02)
        return model.eval()

    def _timm(self) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(self.name, pretrained=False)
        return model

    def _torchvision(self) -> nn.Module:
        parameters = inspect.signature(_MODELS.get_model_builder(self.name)).parameters
        options: dict[str, Any] = {"weights": None}
        if "weights_backbone" in parameters:
            options["weights_backbone"] = None
        if self.kind == "detection" and not self.name.startswith("ssd"):
            options |= {"min_size": 128, "max_size": 192}  # what they resize images to
        model: nn.Module = _MODELS.get_model(self.name, **options)
        return model

    def _several(self) -> tuple[Any, ...]:
        """What batch norms are warmed by: of one image some would see one value a channel."""
        if self.kind != "detection":
            return self.batch(2)
        return (torch.cat([*self.batch(2), *self.batch(3)]),)

    def batch(self, number: int) -> tuple[Any, ...]:
        """One batch of random inputs: 0 to calibrate on, 1 to measure on, 2 for batch norms."""
        generator = torch.Generator().manual_seed(number + 1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        if self.kind == "video":
            size = 224 if self.name.startswith("mvit") else 64
            return (random(1 if size == 224 else 2, 3, 16, size, size),)
        if self.kind == "flow":
            return random(1, 3, 128, 128).clamp(-1, 1), random(1, 3, 128, 128).clamp(-1, 1)
        if self.kind == "detection":
            return (torch.rand(1, 3, 96, 128, generator=generator),)
        size = self._pixels()
        return (random(_IMAGES if size < 200 else 2, 3, size, size),)

    def _pixels(self) -> int:
        """The fewest that the network is built for, 64 and more."""
        if self.kind == "segmentation":
            return 96
        if self.kind == "classification":
            if self.name.startswith("swin_v2"):
                return 256
            if self.name.startswith(("vit", "maxvit", "swin", "alexnet")):
                return 224
            return 128 if self.name == "inception_v3" else 96
        import timm

        config: Any = timm.models.get_pretrained_cfg(self.name)
        if config is None or config.fixed_input_size or self.name.startswith(_FIXED):
            return int(timm.create_model(self.name).default_cfg["input_size"][-1])
        return 128

    def recipe_of(self, model: nn.Module) -> str:
        """Networks with attention or layer norms take the recipe of transformers."""
        return "vit_w8a8" if any(isinstance(m, _SEVERAL) for m in model.modules()) else "w8a8"


# Attention over the whole map, or tables of its size, without timm's word that the size is fixed.
_FIXED = (
    *("botnet", "halonet", "bat_", "coatnet", "maxvit", "levit", "gcvit", "efficientformer"),
    *("crossvit", "coat_", "convit", "nest", "tnt", "volo", "swin", "beit", "eva02", "hiera"),
    *("mixer", "gmlp", "resmlp", "pit_", "cait", "deit", "vit_", "visformer", "xcit", "twins"),
    *("mvitv2", "efficientvit_m", "tiny_vit", "sequencer", "focalnet", "davit", "edgenext"),
)
NETWORKS = {
    f"{'timm' if kind == 'timm' else 'torchvision'}:{name}": kind
    for kind, names in {"timm": TIMM, **_OF}.items()
    for name in names
}
"""Their kinds by their spellings."""


def known(spelling: str) -> str:
    """What argparse takes as `type`: a spelling; of others it says the nearest."""
    if spelling not in NETWORKS:
        hint = nearest(spelling, list(NETWORKS))
        raise argparse.ArgumentTypeError(f"there is no network {spelling}{hint}")
    return spelling


def of(spelling: str) -> Network:
    return Network(spelling, NETWORKS[spelling])
