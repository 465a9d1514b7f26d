"""SwiftBrush v2 in PyTorch autograd, written from the papers' equations: what our step is compared with.

diffusers' and transformers' networks, peft's LoRA, torch.optim's AdamW; only the random numbers are given. All
in float64, so that a difference is the rounding of our float32 or a mistake, never the reference's rounding.
"""

import copy
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


@dataclasses.dataclass(kw_only=True)
class Method:
    """The numbers of the method; `lr`, `eps`, `weight_decay` and `clip_norm` are AdamW's and the clip's."""

    total_steps: int
    timesteps: tuple[int, ...] = (999,)
    student_prediction: str = "epsilon"
    teacher_prediction: str = "epsilon"
    weighting: str = "sbv2"
    score_weighting: str = "epsilon"
    guidance: float = 4.5
    score_guidance: float = 4.5
    vsd_weight: float = 1.0
    clip_weight: float = 0.0
    tau: float = 0.35
    ema: float = 0.0
    student_lr: float = 1e-3
    score_lr: float = 1e-3
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0


class Process:
    """x_t = a_t x + s_t epsilon, and what a network of this prediction type says of x_t."""

    def __init__(self, prediction: str):
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.prediction = prediction
        self.alphas_cumprod = scheduler.alphas_cumprod.double()

    @property
    def last(self) -> int:
        return len(self.alphas_cumprod) - 1

    def a(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)

    def s(self, t: Tensor) -> Tensor:
        return (1 - self.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)

    def noised(self, x: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        return self.a(t) * x + self.s(t) * epsilon

    def epsilon(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        # v = a epsilon - s x0, so that s x_t + a v = (s^2 + a^2) epsilon.
        return self.a(t) * output + self.s(t) * x_t if self.prediction == "v_prediction" else output

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - self.s(t) * self.epsilon(output, x_t, t)) / self.a(t)


class Reference:
    """One run: the networks, the two optimisers and the averaged student.

    unet, text, clip, vae: configurations; `vae` None for no CLIP loss. student_lora, score_lora: rank, alpha
    and targets; `student_lora` None trains the whole student. For SDXL `text_2` is the second tower, `side` that
    of the pictures in pixels, and `zero_null` whether the null condition is zeros.

    What a prompt gives the UNet is a tuple: the context and, for SDXL, the pooled text.
    """

    def __init__(
        self,
        method: Method,
        *,
        unet: dict,
        text: dict,
        clip: dict,
        vae: tuple[str, dict] | None,
        student_lora: dict | None,
        score_lora: dict,
        text_2: dict | None = None,
        side: int = 0,
        zero_null: bool = False,
    ):
        self.method = method
        self.student_process = Process(method.student_prediction)
        self.process = Process(method.teacher_prediction)
        self.teacher = UNet2DConditionModel.from_config(unet)
        self.score = with_lora(copy.deepcopy(self.teacher), score_lora)
        self.student = UNet2DConditionModel.from_config(unet)
        if student_lora is not None:
            self.student = with_lora(self.student, student_lora)
        self.text = CLIPTextModel(CLIPTextConfig(**text))
        self.text_2 = None if text_2 is None else CLIPTextModelWithProjection(CLIPTextConfig(**text_2))
        self.side, self.zero_null = side, zero_null
        self.clip = CLIPModel(CLIPConfig(**clip))
        self.vae = None
        if vae is not None:
            self.vae = {"tiny": AutoencoderTiny, "kl": AutoencoderKL}[vae[0]].from_config(vae[1])
        torch.set_num_threads(1)  # on tensors of this size, more threads only wait for each other
        for module in self.modules():
            module.double().eval()
        for module in self.modules():
            if module not in (self.student, self.score):
                module.requires_grad_(False)

    def modules(self) -> list[torch.nn.Module]:
        every = [self.teacher, self.score, self.student, self.text, self.text_2, self.clip, self.vae]
        return [module for module in every if module is not None]

    def start(self) -> None:
        """Makes the optimisers and the average, once the weights are loaded; `gradients` are the last, unclipped."""
        m = self.method
        self.optimizers = {
            module: torch.optim.AdamW(trained(module), lr=lr, eps=m.eps, weight_decay=m.weight_decay)
            for module, lr in ((self.student, m.student_lr), (self.score, m.score_lr))
        }
        self.gradients = {}
        self.average = copy.deepcopy(self.student)

    @torch.no_grad()
    def encode(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The text of prompts [B, S], or for SDXL [B, 2, S]."""
        if self.text_2 is None:
            return (self.text(input_ids=ids).last_hidden_state,)
        first = self.text(input_ids=ids[:, 0], output_hidden_states=True)
        second = self.text_2(input_ids=ids[:, 1], output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def encode_null(self, empty_ids: Tensor) -> tuple[Tensor, ...]:
        """The null condition, each part without a batch axis."""
        return tuple(part[0] * (not self.zero_null) for part in self.encode(empty_ids))

    def output(self, unet, x_t: Tensor, t: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        if self.text_2 is None:
            return unet(x_t, t, text[0]).sample
        sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]]).repeat(len(x_t), 1)
        added = {"text_embeds": text[1], "time_ids": sizes}
        return unet(x_t, t, text[0], added_cond_kwargs=added).sample

    def generate(self, start: tuple, text: tuple[Tensor, ...]) -> Tensor:
        """x = G(z, y): the x0 that the student sees in pure noise at the last timestep.

        `start` holds z, the noises of the later steps, and how many steps are simulated before the one that counts:
        backward simulation (DMD2, section 4.5), each earlier x0 noised to the next timestep, without gradient.
        """
        x_t, again, taken = start

        def x0(number: int) -> Tensor:
            t = torch.full((len(x_t),), self.method.timesteps[number])
            return self.student_process.x0(self.output(self.student, x_t, t, text), x_t, t)

        for number in range(taken):
            with torch.no_grad():
                t = torch.full((len(x_t),), self.method.timesteps[number + 1])
                x_t = self.student_process.noised(x0(number), again[number], t)
        return x0(taken)

    def guided(self, unet, x_t: Tensor, t: Tensor, text: tuple, null: tuple, scale: float) -> Tensor:
        conditional = self.process.epsilon(self.output(unet, x_t, t, text), x_t, t)
        if scale == 1:
            return conditional
        nulls = tuple(part.expand_as(own) for part, own in zip(null, text, strict=True))
        unconditional = self.process.epsilon(self.output(unet, x_t, t, nulls), x_t, t)
        return unconditional + scale * (conditional - unconditional)

    @torch.no_grad()
    def vsd_direction(self, x: Tensor, epsilon: Tensor, t: Tensor, text: tuple, null: tuple) -> Tensor:
        """w_t (eps_T - eps_S), with the weight of each sample spelt out (SwiftBrush; DMD, equation 8)."""
        m, process = self.method, self.process
        x_t = process.noised(x, epsilon, t)
        teacher = self.guided(self.teacher, x_t, t, text, null, m.guidance)
        score = self.guided(self.score, x_t, t, text, null, m.score_guidance)
        if m.weighting == "sbv2":
            weight = process.s(t) ** 2
        else:
            teacher_x0 = (x_t - process.s(t) * teacher) / process.a(t)
            error = (x - teacher_x0).abs().mean(dim=(1, 2, 3), keepdim=True)
            weight = process.s(t) / process.a(t) / error
        return weight * (teacher - score)

    def cosines(self, x: Tensor, ids: Tensor) -> Tensor:
        """The cosines between the decoded pictures of the latents and their prompts, [B]."""
        pictures = self.vae.decode(x / self.vae.config.scaling_factor).sample
        pictures = (pictures / 2 + 0.5).clamp(0, 1)
        size = self.clip.config.vision_config.image_size
        pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        image = self.clip.vision_model(pixel_values=(pictures - mean) / std).pooler_output
        text = self.clip.text_model(input_ids=ids).pooler_output
        return F.cosine_similarity(self.clip.visual_projection(image), self.clip.text_projection(text))

    def student_loss(self, x, noise, t, text, null, clip_ids, step: int) -> tuple[Tensor, dict[str, float]]:
        m = self.method
        direction = self.vsd_direction(x.detach(), noise, t, text, null)
        loss = m.vsd_weight * (direction * x).mean()
        reported = {"loss/vsd": 0.5 * (direction**2).mean()}
        if self.vae is not None:
            clamped = torch.clamp(m.tau - self.cosines(x, clip_ids), min=0).mean()
            loss = loss + m.clip_weight * (1 - step / m.total_steps) * clamped
            reported["loss/clip"] = clamped
        return loss, {name: value.item() for name, value in reported.items()}

    def score_loss(self, x, noise, t, null_mask, text, null) -> Tensor:
        x_t = self.process.noised(x, noise, t)
        rows = [null if dropped else own for dropped, *own in zip(null_mask, *text, strict=True)]
        output = self.output(self.score, x_t, t, tuple(map(torch.stack, zip(*rows, strict=True))))
        return self.denoising(output, x, x_t, noise, t).mean()

    def denoising(self, output: Tensor, x: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The squared errors of the score model's output, each with its weight."""
        a, s = self.process.a(t), self.process.s(t)
        epsilon = self.process.epsilon(output, x_t, t)
        kind = self.method.score_weighting
        if kind == "native":
            kind = {"epsilon": "plain epsilon", "v_prediction": "v"}[self.process.prediction]
        if kind == "v":
            v = a * epsilon - s * self.process.x0(output, x_t, t)
            return (v - (a * noise - s * x)) ** 2
        return (epsilon - noise) ** 2 * (a**2 if kind == "epsilon" else 1)

    def step(
        self, index: int, ids, clip_ids, empty_ids, student_draw, score_draw, fresh=()
    ) -> dict[str, float]:
        """Trains the score model on fresh samples, the student, the score model on its samples; returns the losses.

        student_draw: the start of `generate`, noise, t. score_draw: noise, t and the mask of null prompts. fresh: for
        each update of the score model on samples of its own the ids of the prompts, a start, and a score_draw (DMD2's
        two time scales).
        """
        start, noise, t = student_draw
        text, null = self.encode(ids), self.encode_null(empty_ids)
        score_losses = []
        for fresh_ids, fresh_start, fresh_draw in fresh:
            fresh_text = self.encode(fresh_ids)
            with torch.no_grad():
                fresh_x = self.generate(fresh_start, fresh_text)
            score_losses.append(self.score_loss(fresh_x, *fresh_draw, fresh_text, null))
            self.descend(self.score, score_losses[-1])
        x = self.generate(start, text)
        loss, reported = self.student_loss(x, noise, t, text, null, clip_ids, index)
        self.descend(self.student, loss)
        decay = min(self.method.ema, (1 + index) / (10 + index))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.student.parameters(), strict=True):
                mean.copy_(decay * mean + (1 - decay) * new)
        score_losses.append(self.score_loss(x.detach(), *score_draw, text, null))
        self.descend(self.score, score_losses[-1])
        return reported | {"loss/score": sum(loss.item() for loss in score_losses) / len(score_losses)}

    def descend(self, module: torch.nn.Module, loss: Tensor) -> None:
        self.optimizers[module].zero_grad()
        loss.backward()
        self.gradients[module] = {
            plain_name(n): p.grad.numpy().copy() for n, p in module.named_parameters() if p.requires_grad
        }
        norm = torch.nn.utils.clip_grad_norm_(trained(module), self.method.clip_norm)
        assert norm > self.method.clip_norm, "a clip that does nothing is not tested"
        for parameter in trained(module):
            parameter.grad *= (
                norm + 1e-6
            ) / norm  # PyTorch divides by norm + 1e-6, the definition by the norm
        self.optimizers[module].step()


def with_lora(module: torch.nn.Module, settings: dict) -> torch.nn.Module:
    """Returns the module with peft's LoRA on the dense layers that the regular expression matches."""
    config = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["targets"], lora_dropout=0.0
    )
    return inject_adapter_in_model(config, module)


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def plain_name(name: str) -> str:
    """Returns the name that a parameter would have without peft; a LoRA's factors are `lora.down`, `lora.up`."""
    name = name.replace(".base_layer.", ".")
    return name.replace(".lora_A.default.", ".lora.down.").replace(".lora_B.default.", ".lora.up.")


def load(module: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Loads arrays under their plain names: all of them, and nothing is left as it was."""
    state = module.state_dict()
    if not any(name.startswith("text_model.") for name in state):  # transformers 5 names the text tower so
        arrays = {name.removeprefix("text_model."): array for name, array in arrays.items()}
    named = {
        name: torch.tensor(np.asarray(arrays.pop(plain_name(name))), dtype=torch.float64) for name in state
    }
    assert not arrays, sorted(arrays)
    module.load_state_dict(named)


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the trained weights under their plain names."""
    return {plain_name(n): p.detach().numpy().copy() for n, p in module.named_parameters() if p.requires_grad}


def nchw(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64).permute(0, 3, 1, 2).contiguous()


def integers(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array)).long()
