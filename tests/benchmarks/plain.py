"""GPT-2 with LoRA in plain PyTorch, as one would first write it: all steps explicit, none fused.

Query, key and value are separate layers, attention materializes its score matrix, dropout is
PyTorch's, and every position, including padding, goes through every layer. The weights come from
one of our models, so the tests also check our training against this model.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gpt2 import GPT2Model
from modules.gpt2_layer import GPT2Layer
from modules.lora import FUSED, LoRALinear


class PlainLoRA(nn.Module):
    """Part `index` of the `n` parts of one of our LoRA layers."""

    def __init__(self, lora: LoRALinear, index: int = 0, n: int = 1):
        super().__init__()
        W, b, A, B = (
            tensor.detach().chunk(n)[index].clone()
            for tensor in (lora.weight, lora.bias, lora.lora_A, lora.lora_B)
        )
        self.weight, self.bias = nn.Parameter(W, False), nn.Parameter(b, False)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.scale, self.dropout = lora.scale, nn.Dropout(lora.dropout.p)

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.dropout(x) @ self.lora_A.T @ self.lora_B.T
        return F.linear(x, self.weight, self.bias) + self.scale * adapted


class PlainLayer(nn.Module):
    """One block."""

    def __init__(self, layer: GPT2Layer):
        super().__init__()
        self.n_head = layer.self_attention.n_head
        self.norm1, self.norm2 = layer.attention_layer_norm, layer.out_layer_norm
        for index, name in enumerate(FUSED):
            setattr(self, name, PlainLoRA(layer.self_attention.qkv, index, len(FUSED)))
        self.dense = PlainLoRA(layer.attention_dense)
        self.interm = PlainLoRA(layer.interm_dense)
        self.out = PlainLoRA(layer.out_dense)
        self.attn_dropout = nn.Dropout(layer.self_attention.dropout_p)
        self.dropout = nn.Dropout(layer.dropout.p)

    def attention(self, x: Tensor, hidden: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            layer(x).view(B, T, self.n_head, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(hidden, -torch.inf)
        y = self.attn_dropout(scores.softmax(3)) @ v
        return y.transpose(1, 2).reshape(B, T, C)

    def forward(self, h: Tensor, hidden: Tensor) -> Tensor:
        h = h + self.dropout(self.dense(self.attention(self.norm1(h), hidden)))
        y = F.gelu(self.interm(self.norm2(h)), approximate="tanh")
        return h + self.dropout(self.out(y))


class PlainParaphrase(nn.Module):
    """The cloze of `ParaphraseGPT`, made from our GPT-2 with LoRA on all layers."""

    def __init__(self, gpt: GPT2Model, answers: tuple[int, int]):
        super().__init__()
        self.words, self.positions = gpt.word_embedding, gpt.pos_embedding
        self.dropout = nn.Dropout(gpt.embed_dropout.p)
        self.layers = nn.ModuleList(PlainLayer(layer) for layer in gpt.gpt_layers)
        self.norm, self.answers = gpt.final_layer_norm, list(answers)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_index: Tensor | None = None
    ) -> Tensor:
        B, T = input_ids.shape
        positions = torch.arange(T, device=input_ids.device)
        h = self.dropout(self.words(input_ids) + self.positions(positions))
        hidden = (positions > positions[:, None]) | (attention_mask[:, None, None] == 0)
        for layer in self.layers:
            h = layer(h, hidden)
        last = attention_mask.sum(1) - 1
        state = self.norm(h)[torch.arange(B, device=h.device), last]
        return (state @ self.words.weight.T)[:, self.answers]
