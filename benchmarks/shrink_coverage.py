"""Which networks `kk.torch.shrink` makes smaller, each proven equal, beside Torch-Pruning.

Every network has random weights and is shrunk to half of the units of each group, without any help for it. Ours
counts if the proof holds: removing the units equals making them zero, to 1e-5 of the largest output (RAFT, which is
recurrent: 2e-5). The peer counts if its pruned network still runs and returns the shapes of the original, which
is less. Of the networks of one construct it is asked of both that the asked number of parameters stays and that the
outputs are those of the original with zeros in place of what went.

    python benchmarks/shrink_coverage.py [torchvision timm transformers constructs] [--peer] [--most 100] [--limit 600]
        [--only 'swin*']

One process per network, of one thread; what is finished is stored in ``runs/shrink_coverage.json``, so that an
interrupted command resumes. `--most`: millions of parameters, larger networks are left out. `--limit`: seconds
of processor time for a network (the peer has 60).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import karikomi as kk
from karikomi.files import write_text

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "runs" / "shrink_coverage.json"
PEER_LIMIT = 60.0  # seconds
SHARE = 0.5
TIMM = """
    convnext_atto mobilenetv4_conv_small repvgg_a0 hrnet_w18_small dla34 starnet_s1 tf_efficientnet_lite0
    ghostnet_100 beit_base_patch16_224 vit_tiny_patch16_224 deit3_small_patch16_224 xcit_nano_12_p16_224
    davit_tiny coat_lite_tiny mobilevit_xxs pvt_v2_b0 gmlp_s16_224 poolformer_s12 nf_resnet50
    edgenext_xx_small mixer_s32_224 resmlp_12_224 levit_128s efficientformer_l1 res2net50_26w_4s
    cspresnet50 fastvit_t8 mobilevitv2_050 focalnet_tiny_srf resnest14d
""".split()
DETECTORS = ("rcnn", "retinanet", "ssd", "fcos")

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A network and the arguments of its forward."""


def torchvision_names() -> list[str]:
    """Return all models but the detectors, whose boxes have data-dependent numbers, and the quantized ones."""
    models = _torchvision().models
    names = [name for name in models.list_models() if not name.startswith("quantized_")]
    return [name for name in names if not any(part in name for part in DETECTORS)]


def _torchvision() -> Any:
    try:
        import torchvision
    except RuntimeError:
        # A build for CUDA beside a torch without it: its own operators, which only detectors use, do not load.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def torchvision_example(name: str) -> Example:
    """Return a torchvision model without weights, on the smallest input that it is made for."""
    vision = _torchvision()
    options = {"weights_backbone": None} if re.search("fcn|deeplab|lraspp", name) else {}
    model = vision.models.get_model(name, weights=None, **options)
    sizes = {
        "inception_v3": (3, 299, 299),
        "r3d_18": (3, 4, 56, 56),
        "mc3_18": (3, 4, 56, 56),
        "r2plus1d_18": (3, 4, 56, 56),
        "s3d": (3, 16, 224, 224),
        "mvit": (3, 16, 224, 224),
        "swin3d": (3, 4, 56, 56),
        "raft": (3, 128, 128),
        "h_14": (3, 224, 224),
    }
    size = next((size for part, size in sizes.items() if name.startswith(part)), (3, 224, 224))
    image = torch.randn(1, *size)
    return model, (image, torch.randn(1, *size)) if "raft" in name else (image,), {}


def timm_example(name: str) -> Example:
    """Return a timm model without weights."""
    with contextlib.suppress(ImportError):
        _torchvision()  # which timm imports
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, (torch.randn(1, *model.default_cfg["input_size"]),), {}


def _transformers() -> dict[str, Callable[[], Example]]:
    with contextlib.suppress(ImportError):
        _torchvision()  # which transformers imports where it is installed
    import transformers as t

    small: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    grouped = {**small, "num_key_value_heads": 2, "pad_token_id": 0}
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    cached = {"use_cache": False}
    whisper = t.WhisperConfig(
        vocab_size=100,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=20,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    t5 = t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    gpt2 = t.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    distil = t.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    opt = t.OPTConfig(**{**small, "ffn_dim": 64, "word_embed_proj_dim": 32})
    vit = t.ViTConfig(**{**small, "image_size": 32, "patch_size": 8})
    convnext = t.ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], image_size=64)
    return {
        "BERT": lambda: (t.BertModel(t.BertConfig(**small)), (tokens,), {}),
        "DistilBERT": lambda: (t.DistilBertModel(distil), (tokens,), {}),
        "GPT-2": lambda: (t.GPT2LMHeadModel(gpt2), (tokens,), cached),
        "OPT": lambda: (t.OPTForCausalLM(opt), (tokens,), cached),
        "Llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**grouped)), (tokens,), cached),
        "Qwen2": lambda: (t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)), (tokens,), cached),
        "Qwen3": lambda: (
            t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, head_dim=8)),
            (tokens,),
            cached,
        ),
        "Phi-3": lambda: (
            t.Phi3ForCausalLM(t.Phi3Config(**grouped, bos_token_id=1, eos_token_id=2)),
            (tokens,),
            cached,
        ),
        "T5": lambda: (
            t.T5ForConditionalGeneration(t5),
            (),
            {"input_ids": tokens, "decoder_input_ids": tokens, **cached},
        ),
        "ViT": lambda: (t.ViTModel(vit), (torch.randn(2, 3, 32, 32),), {}),
        "ConvNeXt": lambda: (t.ConvNextModel(convnext), (torch.randn(2, 3, 64, 64),), {}),
        "Whisper": lambda: (
            t.WhisperForConditionalGeneration(whisper),
            (torch.randn(1, 8, 100),),
            {"decoder_input_ids": tokens[:1], **cached},
        ),
    }


CONSTRUCTS = """
    flatten; cat and slice; a layer called twice; tied embedding; softmax over channels; written RMS norm;
    group norm; a width in the forward; pixel shuffle; fused attention; grouped queries; RMS norm; LSTM; depthwise;
    a branch without gradients; a scale in a buffer; GRU; a kernel of its own; einsum; channel shuffle;
    gated by chunks; GLU; zero padded shortcut
"""
"""Networks of one construct each, of those in ``tests/shrink_networks.py``."""


def _network(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    from shrink_networks import NETWORKS

    return NETWORKS[name]


def construct_example(name: str) -> Example:
    """Return a network of one construct."""
    return *_network(name).build(), {}


def constructed(name: str, who: str) -> dict[str, Any]:
    """Return the row of a network of one construct."""
    network = _network(name)
    module, inputs = network.build()
    small, report = kk.torch.shrink(module, inputs, width=SHARE)
    row: dict[str, Any] = {"ok": True}
    if who == "peer":
        small = copy.deepcopy(module)
        ends = [n for n, why in report.frozen.items() if why.endswith("outputs of the network")]
        row = peer((small, inputs, {}), [small.get_submodule(path) for path in ends])
    before, after = (sum(p.numel() for p in part.parameters()) for part in (module, small))
    row["parameters"] = after / before
    error = _fault(network, module, small, inputs, compared=not report.statistics)
    good = bool(row["ok"]) and not error
    return {**row, "ok": good, "error": "" if good else error or "another shape"}


def _fault(
    network: Any, module: nn.Module, small: nn.Module, inputs: tuple[Any, ...], *, compared: bool
) -> str:
    """Return what is wrong with a smaller network that runs, of which nothing was said."""
    from zeroing import differ, zeroed

    before, after = (sum(p.numel() for p in part.parameters()) for part in (module, small))
    if after == before:
        return "silent: nothing went"
    if after != network.inner:
        return f"silent: {after} parameters, {network.inner} asked"
    with torch.no_grad():
        apart = differ(zeroed(module, small, network.folded)(*inputs), small(*inputs))
    return "silent: other outputs" if compared and apart > 1e-4 else ""


LISTS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Example]]] = {
    "torchvision": (torchvision_names, torchvision_example),
    "timm": (lambda: TIMM, timm_example),
    "transformers": (lambda: list(_transformers()), lambda name: _transformers()[name]()),
    "constructs": (
        lambda: [name.strip() for name in CONSTRUCTS.split(";")],
        construct_example,
    ),
}


def ours(example: Example) -> dict[str, Any]:
    """Shrink and return what the table shows."""
    model, inputs, options = example
    start = time.process_time()
    given: Any = (inputs, options) if options and inputs else (options or inputs)
    _, report = kk.torch.shrink(model, given, width=SHARE)
    return {
        "ok": True,
        "seconds": time.process_time() - start,
        "parameters": report.parameters_after / report.parameters_before,
        "macs": report.macs_after / max(report.macs_before, 1),
        "difference": report.max_difference,
        "form": report.form,
        "unknown": sorted(why for why in report.frozen.values() if "no rule" in why)[:3],
    }


def peer(example: Example, ignored: list[nn.Module] | None = None) -> dict[str, Any]:
    """Prune half of the channels with Torch-Pruning; ok if the shapes of the outputs are the same.

    `ignored`: layers that stay; None: the last one.
    """
    import torch_pruning as tp

    model, inputs, options = example
    expected = [tensor.shape for tensor in _tensors(model(*inputs, **options))]
    start = time.process_time()
    before = sum(parameter.numel() for parameter in model.parameters())
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1:]
    given: Any = (
        {**options, **dict(zip(_names(model), inputs, strict=False))} if options else inputs
    )
    pruner = tp.pruner.MagnitudePruner(
        model,
        given,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=SHARE,
        ignored_layers=last if ignored is None else ignored,
    )
    pruner.step()
    after = sum(parameter.numel() for parameter in model.parameters())
    got = [tensor.shape for tensor in _tensors(model(*inputs, **options))]
    return {
        "ok": got == expected and after < before,
        "seconds": time.process_time() - start,
        "parameters": after / before,
    }


def _names(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _tensors(value: Any) -> list[torch.Tensor]:
    found, _ = torch.utils._pytree.tree_flatten(value)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def one(group: str, name: str, who: str, limit: float | None = None) -> dict[str, Any]:
    """Return the row of a network, or its error."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    example = LISTS[group][1](name)
    example[0].eval()
    millions = sum(parameter.numel() for parameter in example[0].parameters()) / 1e6
    if limit is not None:
        _limit_(limit)
    try:
        if group == "constructs":
            row = constructed(name, who)
        else:
            row = {"ours": ours, "peer": peer}[who](example)
    except Exception as error:
        row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {**row, "millions": millions, "gigabytes": peak}


def in_a_process(group: str, name: str, who: str, limit: float) -> dict[str, Any]:
    """Run `one` in a process of its own."""
    command = [sys.executable, __file__, "--one", group, name, who, "--limit", str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {"ok": False, "error": f"not done in {limit:.0f} s"}
    if done.returncode:
        return {
            "ok": False,
            "error": done.stderr.strip().splitlines()[-1][:300] if done.stderr else "died",
        }
    return json.loads(done.stdout.splitlines()[-1])


def _limit_(seconds: float) -> None:
    """Let this process end after some more seconds of processor time, whatever else the machine does."""
    last = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (last, last + 5))


def rows(
    groups: list[str], people: list[str], limit: float, most: float, only: str
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield the rows, those that are stored at once."""
    stored = json.loads(STORED.read_text("utf-8")) if STORED.exists() else {}
    work = [
        (group, name, who)
        for group in groups
        for name in _in_order(group, [n for n in LISTS[group][0]() if fnmatch(n, only)])
        for who in people
    ]
    for group, name, who in tqdm(work, desc="networks"):
        key = f"{group}/{name}/{who}"
        if key not in stored:
            if group == "torchvision" and _millions(name) > most:
                stored[key] = {"left_out": True, "millions": _millions(name)}
            elif group == "constructs":
                stored[key] = one(group, name, who)
            else:
                stored[key] = in_a_process(group, name, who, PEER_LIMIT if who == "peer" else limit)
            STORED.parent.mkdir(exist_ok=True)
            write_text(STORED, json.dumps(stored, indent=1))
        yield group, name, who, stored[key]


def _in_order(group: str, names: list[str]) -> list[str]:
    """Return names, those of torchvision by the size of the model, so that much is known early."""
    return sorted(names, key=_millions) if group == "torchvision" else names


@lru_cache
def _millions(name: str) -> float:
    vision = _torchvision()
    options = {"weights_backbone": None} if re.search("fcn|deeplab|lraspp", name) else {}
    try:
        with torch.device("meta"):
            model = vision.models.get_model(name, weights=None, **options)
    except NotImplementedError:  # its initialisation reads values
        model = vision.models.get_model(name, weights=None, **options)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def table(found: list[tuple[str, str, str, dict[str, Any]]]) -> str:
    """Return a line for each network, and the counts of each list."""
    lines = [
        f"{'network':38} {'who':5} {'params':>7} {'macs':>6} {'error':>8} {'s':>6} {'GB':>5}  "
    ]
    counts: dict[tuple[str, str], list[bool]] = {}
    for group, name, who, row in found:
        if row.get("left_out"):
            lines.append(f"{name:38} {who:5} left out: {row['millions']:.0f} M parameters")
            continue
        counts.setdefault((group, who), []).append(bool(row["ok"]))
        figures = f"{row.get('parameters', 0):7.3f} {row.get('macs', 0):6.3f} {row.get('difference', 0):8.1e}"
        size = f"{row.get('seconds', 0):6.1f} {row.get('gigabytes', 0):5.1f}"
        note = row.get("form", "") if row["ok"] else f"FAILED {row.get('error', '')}"
        lines.append(f"{name:38} {who:5} {figures} {size}  {note}")
    for (group, who), good in counts.items():
        lines.append(f"{group}: {who} {sum(good)} of {len(good)}")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("lists", nargs="*", help=", ".join(LISTS))
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--most", type=float, default=100.0)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--only", default="*", help="names of networks, as a glob")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one, limit=given.limit)))
        return
    people = ["ours", "peer"] if given.peer else ["ours"]
    print(
        table(list(rows(given.lists or list(LISTS), people, given.limit, given.most, given.only)))
    )


if __name__ == "__main__":
    main()
