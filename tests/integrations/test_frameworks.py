"""EMAUnit in other people's frameworks: the page Integrations, and what it says of each."""

import pytest
import torch
from torch import nn

from ema_attention import EMAUnit
from tests.integrations.page import EXPORT, SECTIONS, run


@pytest.mark.parametrize("section", [section for section in SECTIONS if section != EXPORT])
def test_the_page_runs_as_it_stands(section: str) -> None:
    run(section)


def test_timm_adds_in_place_behind_a_unit() -> None:
    """The page says to give final_relu=False. This is why."""
    import timm

    model = timm.create_model("resnet18", block_args={"attn_layer": EMAUnit})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_timm_extracts_features_by_torch_fx() -> None:
    import timm
    from timm.models import FeatureGraphNet

    model = timm.create_model("resnet18")
    model.layer3.append(EMAUnit(256, num_bases=8))
    features = FeatureGraphNet(model, out_indices=(3, 4))(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape) for f in features] == [(1, 256, 4, 4), (1, 512, 2, 2)]


def test_transformers_asks_a_models_own_init_weights() -> None:
    from transformers import PretrainedConfig, PreTrainedModel

    class Backbone(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.stem = nn.Conv2d(3, 8, 3)
            self.post_init()

    class Network(Backbone):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.unit = EMAUnit(8, num_bases=4, layer_scale=0)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, EMAUnit):
                module.reset_parameters()
            else:
                super()._init_weights(module)

    Backbone(PretrainedConfig()).save_pretrained("pretrained")
    unit = Network.from_pretrained("pretrained").unit
    torch.testing.assert_close(unit.mu.norm(dim=1), torch.ones(1, 4))
    assert not unit.conv2[1].weight.any()
    torch.testing.assert_close(unit.conv1.weight.std(), torch.tensor(0.5), rtol=0.3, atol=0)  # √(2/8), not 0.02


@pytest.mark.parametrize("options", [{"strategy": "ddp", "devices": 1}, {"precision": "bf16-mixed"}])
def test_lightning_strategies(options: dict) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(3, 8, 3), EMAUnit(8, num_bases=4))

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.network(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)

    model = Classifier()
    before = model.network[1].mu.clone()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3, 9, 9)), 2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet, **options).fit(model, data)
    assert not torch.equal(model.network[1].mu, before)
    torch.testing.assert_close(model.network[1].mu.norm(dim=1), torch.ones(1, 4))


def test_a_unit_from_the_meta_device() -> None:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        unit = EMAUnit(8, num_bases=4, layer_scale=0)
    assert unit.mu.is_meta
    unit.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(unit.mu.norm(dim=1), torch.ones(1, 4))
    x = torch.rand(2, 8, 6, 7)
    torch.testing.assert_close(unit(x), x)
