"""A tiny language model and a tiny CLIP of transformers, all weights random, and their tokenizers, as users have them in folders."""

from pathlib import Path

import pytest


def make_towers() -> dict:
    """By name the language model, 32 wide, and CLIP, 24 wide, each with its tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def tokenizer(end: str, *, both: bool):
        words = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = tokenizers.decoders.ByteLevel()
        specials = ["<unk>", "<begin>", "<pad>", "<end>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
        words.train_from_iterator(["a blue square stands still", "red green blue circle square video describe the following"], trainer)
        begin = ("<begin>", words.token_to_id("<begin>"))
        ends = [(end, words.token_to_id(end))] if both else []
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single="<begin> $A" + f" {end}" * both, special_tokens=[begin, *ends]
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<begin>", pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="right"
        )

    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "intermediate_size": 48, "num_attention_heads": 4}
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(hidden_size=32, num_hidden_layers=4, num_key_value_heads=2, rope_theta=5e5, **sizes)
    )
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=24, num_hidden_layers=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=3, **sizes
        )
    )
    with torch.no_grad():
        for name, parameter in [*llama.named_parameters(), *clip.named_parameters()]:
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.2)
    return {"language": (llama.eval(), tokenizer("<end>", both=False)), "clip": (clip.eval(), tokenizer("<end>", both=True))}


def save_towers(towers: dict, folder: Path) -> None:
    """Each in a folder of its name."""
    for name, (model, tokenizer) in towers.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
