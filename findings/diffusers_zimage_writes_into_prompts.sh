#!/usr/bin/env bash
# diffusers 0.42.1's ZImagePipeline writes the chat template into the list of prompts that it is given: `_encode_prompt` assigns each
# templated text back to the caller's own list, prompts and negative prompts alike. A script that gives one list to several calls (seeds,
# a sweep of steps) has every prompt wrapped once more in each: the second call's pictures are of another text, without a word. A prompt
# that is a string is safe. The pipelines beside it (ControlNet, inpainting, image to image) have the same line.
#
# Seen (a tiny text encoder with random weights):
#   the list before: ['a dog']
#   after one call:  ['<user>a dog<assistant>']
#   after two:       ['<user><user>a dog<assistant><assistant>']
#   tokens of the first and the second call: 4 and 6
#   a string given twice: 4 and 4
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
export HF_HUB_OFFLINE=1 HF_HOME="$place/home"
"$place/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "dog": 2, "<user>": 3, "<assistant>": 4, "<unk>": 5}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
torch.manual_seed(0)
pipe = ZImagePipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKL(),
    text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=6, **tiny)),
    tokenizer=tokenizer,
    transformer=ZImageTransformer2DModel(
        dim=32, n_heads=2, n_kv_heads=2, n_layers=1, n_refiner_layers=1, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64], cap_feat_dim=16
    ),
)


def tokens(prompt):
    with torch.no_grad():
        texts, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return len(texts[0])


prompts = ["a dog"]
print("the list before:", prompts)
first = tokens(prompts)
print("after one call: ", prompts)
once = list(prompts)
second = tokens(prompts)
print("after two:      ", prompts)
print(f"tokens of the first and the second call: {first} and {second}")
text = "a dog"
again = tokens(text), tokens(text)
print("a string given twice: {} and {}".format(*again))
assert once == ["<user>a dog<assistant>"] and prompts == ["<user><user>a dog<assistant><assistant>"], "this has changed"
assert (first, second) == (4, 6) and again == (4, 4), "this has changed"
PYTHON
