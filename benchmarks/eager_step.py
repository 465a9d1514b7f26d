"""The main job's step in eager PyTorch: diffusers' networks, peft's LoRA, fused AdamW, random numbers of its own."""

import copy

import jax
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextModel

from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.diffusion.schedule import make_schedule


class EagerStep:
    """Full training of a student of v, DMD's weighting, guidance on the teacher alone, EMA."""

    def __init__(self, config, tokenizer, prompts):
        directory = resolve(config.teacher)
        self.text = CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=torch.float32)
        self.student = UNet2DConditionModel.from_pretrained(directory / "unet", torch_dtype=torch.float32)
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        lora = LoraConfig(
            r=config.score.rank, lora_alpha=config.score.alpha, target_modules=config.score.targets
        )
        # The teacher is the score model without its adapters: one copy of the weights.
        self.score = inject_adapter_in_model(lora, copy.deepcopy(self.student))
        self.score_weights = [one for one in self.score.parameters() if one.requires_grad]
        settings = {"betas": (config.optimizer.b1, config.optimizer.b2), "fused": True}
        self.optimizers = [
            torch.optim.AdamW(self.student.parameters(), lr=config.student.lr, **settings),
            torch.optim.AdamW(self.score_weights, lr=config.score.lr, **settings),
        ]
        self.config, self.tokenizer, self.prompts = config, tokenizer, prompts
        side = self.student.config.sample_size
        self.shape = (config.batch_size, self.student.config.in_channels, side, side)
        schedule = make_schedule(load_pipeline(directory).schedule_config)
        self.a, self.s = (torch.tensor(jax.device_get(one)) for one in (schedule.alpha, schedule.sigma))
        with torch.no_grad():
            self.null = self._encode([""])

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        return self.text(torch.tensor(self.tokenizer.encode(prompts), dtype=torch.long)).last_hidden_state

    def _of(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)

    def _adapted(self, on: bool) -> None:
        for module in self.score.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)

    def __call__(self) -> None:
        config, count = self.config, self.config.batch_size
        with torch.no_grad():
            text = self._encode(next(self.prompts))
        z, last = torch.randn(self.shape), torch.full((count,), len(self.a) - 1)
        a, s = self._of(last)
        x = a * z - s * self.student(z, last, text).sample
        with torch.no_grad():
            t, noise = (
                torch.randint(config.vsd.t_min, config.vsd.t_max + 1, (count,)),
                torch.randn(self.shape),
            )
            a, s = self._of(t)
            x_t = a * x + s * noise
            null = self.null.expand_as(text)
            self._adapted(False)
            guided = self.score(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, text])).sample
            without, with_ = guided.chunk(2)
            teacher = without + config.vsd.guidance * (with_ - without)
            self._adapted(True)
            score = self.score(x_t, t, text).sample
            weight = s / (a * (x - (a * x_t - s * teacher)).abs().mean((1, 2, 3), keepdim=True))
            direction = weight * a * (teacher - score)
        self._descend(0, (direction * x).mean(), self.student.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.student.parameters()), 1 - config.ema
            )
        dropped = torch.rand(count, 1, 1) < config.score.null_prompt_probability
        x, t, noise = x.detach(), torch.randint(0, len(self.a), (count,)), torch.randn(self.shape)
        a, s = self._of(t)
        x_t = a * x + s * noise
        output = self.score(x_t, t, torch.where(dropped, self.null, text)).sample
        epsilon = s * x_t + a * output
        self._descend(1, (a**2 * (epsilon - noise) ** 2).mean(), self.score_weights)

    def _descend(self, which: int, loss: torch.Tensor, weights) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights), self.config.optimizer.clip_norm)
        self.optimizers[which].step()
