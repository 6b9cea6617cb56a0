"""A causal model with fewer layers and tokens: what is left computes what it did, and the tokenizer goes with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.sft.adapt import adapt_causal_lm
from rl4dlm.sft.cut import choose_layers, cut_vocabulary, keep_layers, next_token_loss

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["the thin thing there", "boxed{12} and boxed{3}", "a number of numbers", "12+3*4", "where is the other one"]
TEXTS = ["12+3*4\n", "15*4\n\\boxed{60}", "there: \\boxed{1}"]


def byte_level_tokenizer(extra: int = 140, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges learnt from the corpus, digits on their own, as SmolLM's."""
    backend = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + extra,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], backend.token_to_id(SPECIAL[1]))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2], unk_token=SPECIAL[0]
    )


def causal_model(tokenizer: Any, *, layers: int = 2, rows: int | None = None, tied: bool = True) -> Any:
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id, 0],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(("tied", "bos"), [(True, False), (False, True)])
def test_tokens_and_their_logits_are_what_they_were(tied: bool, bos: bool, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(bos=bos)
    model = causal_model(tokenizer, rows=len(tokenizer) + 5, tied=tied)  # with spare rows, which go
    before, ends = copy.deepcopy(model), model.config.eos_token_id
    small, cut = cut_vocabulary(model, tokenizer, TEXTS)
    assert small is model and 256 < len(cut) == model.config.vocab_size < len(tokenizer)
    assert len(tokenizer) == before.config.vocab_size - 5, "the tokenizer that was given is as it was"

    old_id = torch.tensor(
        [tokenizer.convert_tokens_to_ids(token) for token in cut.convert_ids_to_tokens(range(len(cut)))]
    )
    assert old_id.tolist() == sorted(set(old_id.tolist()))
    for text in TEXTS:
        old, new = tokenizer(text).input_ids, cut(text).input_ids
        assert old_id[new].tolist() == old
        with torch.no_grad():
            wanted = before(input_ids=torch.tensor([old])).logits[..., old_id]
            torch.testing.assert_close(model(input_ids=torch.tensor([new])).logits, wanted, rtol=1e-12, atol=1e-12)
    assert [old_id[i] for i in model.config.eos_token_id] == ends
    assert model.config.pad_token_id == cut.pad_token_id == model.get_input_embeddings().padding_idx
    assert set(SPECIAL) <= set(cut.get_vocab())

    model.save_pretrained(tmp_path)
    cut.save_pretrained(tmp_path)
    again, loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64"),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    ids = torch.tensor([loaded(TEXTS[1]).input_ids])
    assert ids.tolist() == [cut(TEXTS[1]).input_ids]
    with torch.no_grad():
        # The rotary frequencies of a loaded model are float32.
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_any_other_text_can_still_be_encoded() -> None:
    tokenizer = byte_level_tokenizer()
    _, cut = cut_vocabulary(causal_model(tokenizer), tokenizer, TEXTS)
    text = "other numbers, é and 漢"
    assert len(cut(text).input_ids) > len(tokenizer(text).input_ids)
    assert cut.decode(cut(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids) == text


def test_what_cannot_be_cut_is_refused() -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(ValueError, match="the model is a denoiser"):
        cut_vocabulary(tiny_llada(), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="without byte-level pieces; only byte-level BPE can be cut"):
        cut_vocabulary(causal_model(tiny_tokenizer()), tiny_tokenizer(), TEXTS)
    with pytest.raises(ValueError, match="the embedding has 40 rows"):
        model = causal_model(tokenizer, rows=40)
        cut_vocabulary(model, tokenizer, TEXTS)


def test_kept_layers_compute_what_they_did() -> None:
    tokenizer = byte_level_tokenizer()
    model = causal_model(tokenizer, layers=4)
    whole, ids = copy.deepcopy(model), torch.tensor([tokenizer(TEXTS[1]).input_ids])
    for i in (1, 3):  # a layer whose two branches add nothing is not there
        layer = whole.model.layers[i]
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    assert keep_layers(model, [0, 2]) is model and model.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
        assert torch.equal(model(input_ids=ids, use_cache=True).logits, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [0, 4], [-1, 2]])
def test_layers_that_are_not_there_are_refused(layers: list[int]) -> None:
    model = causal_model(byte_level_tokenizer(), layers=4)
    with pytest.raises(ValueError, match=r"layers=.* is not allowed; give rising numbers of its layers, 0 to 3"):
        keep_layers(model, layers)


def test_layers_are_chosen_as_by_removing_each_in_turn() -> None:
    tokenizer = byte_level_tokenizer()
    model = causal_model(tokenizer, layers=5)
    ids = torch.randint(len(tokenizer), (2, 11), generator=torch.Generator().manual_seed(1))
    wanted = list(range(5))
    while len(wanted) > 2:
        losses = {}
        for layer in wanted:
            rest = [i for i in wanted if i != layer]
            losses[layer] = next_token_loss(keep_layers(copy.deepcopy(model), rest), ids)
        wanted.remove(min(losses, key=losses.__getitem__))
    state = copy.deepcopy(model.state_dict())
    assert choose_layers(model, ids, 2) == wanted
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert choose_layers(model, ids, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="count=6 is not allowed; the model has 5 layers"):
        choose_layers(model, ids, 6)


def test_the_loss_is_that_of_the_next_token() -> None:
    tokenizer = byte_level_tokenizer()
    model = causal_model(tokenizer)
    ids = torch.tensor([tokenizer(TEXTS[1]).input_ids])
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss
    assert next_token_loss(model, ids) == pytest.approx(float(wanted))


def test_a_model_out_of_a_gguf_file_can_be_saved(tmp_path: Path) -> None:
    """transformers remembers that the weights were packed, and refuses to write them unless it is made to forget."""
    gguf = pytest.importorskip("gguf")
    tokenizer = byte_level_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if i < len(SPECIAL) else 1 for i in range(len(tokenizer))])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "blk.0.attn_norm",
        "post_attention_layernorm": "blk.0.ffn_norm",
        **{f"self_attn.{x}_proj": f"blk.0.attn_{x}" for x in "qkv"},
        "self_attn.o_proj": "blk.0.attn_output",
        **{f"mlp.{x}_proj": f"blk.0.ffn_{x}" for x in ("gate", "up", "down")},
    }
    for name, value in model.state_dict().items():
        short = name.removeprefix("model.layers.0.").removesuffix(".weight")
        if short in names:
            kind = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(value.numpy(), kind)
            writer.add_tensor(f"{names[short]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    settings = {"attention": "block_causal", "block_length": 4}
    denoiser, read = adapt_causal_lm(tmp_path, gguf_file="model.gguf", **settings)
    assert read(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert not hasattr(denoiser.config, "quantization_config")
    save_denoiser(denoiser, tmp_path / "saved", read)
    ids = torch.tensor([read(TEXTS[1]).input_ids])
    with torch.no_grad():
        wanted = denoiser(input_ids=ids).logits
        assert torch.equal(load_denoiser(tmp_path / "saved")(input_ids=ids).logits, wanted)
