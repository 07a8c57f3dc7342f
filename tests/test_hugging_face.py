"""transformers' models: exact units at true widths, and ResiDual inside them, beside them and around them."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
import transformers
from test_towers import relative
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    ChineseCLIPConfig,
    CLIPConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipConfig,
    ViTConfig,
)

import residual_kernels as rk
from residual_kernels import cli, towers
from residual_kernels.data.models import load_model
from residual_kernels.demo import story as demo
from residual_kernels.towers.hugging_face.image_tower import ImageTower, image_tower

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "projection_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLIP_TEXT = TEXT | {"sep_token_id": 3}
SIGLIP_TEXT = {name: value for name, value in TEXT.items() if name != "projection_dim"}


def vision(width=48, heads=3, size=16, patch=8, **more) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
    } | more


def unsettled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random norms, biases, tokens and LayerScale,
    so that nothing in it is a hidden identity."""
    for name, p in model.named_parameters():
        if p.ndim == 1 and p.numel() > 1:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") or "lambda" in name else 0.0, 0.2)
        elif "token" in name or "position" in name:
            torch.nn.init.normal_(p, 0.0, 0.2)
    return model.eval()


def make(kind: str, config, seed=0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return unsettled(getattr(transformers, kind)(config))


def clip(dim=32, seed=0, **more):
    return make(
        "CLIPModel", CLIPConfig(vision_config=vision(**more), text_config=TEXT, projection_dim=dim), seed
    )


def blip(dim=32, **more):
    config = BlipConfig(
        vision_config=vision(**more),
        text_config=BLIP_TEXT | {"encoder_hidden_size": more.get("width", 48)},
        image_text_hidden_size=dim,
    )
    return make("BlipForImageTextRetrieval", config)


def siglip(**more):
    text = SIGLIP_TEXT | {"hidden_size": more.get("width", 48), "num_attention_heads": 3}
    return make("SiglipModel", SiglipConfig(vision_config=vision(**more), text_config=text))


def pooled(features):
    """The tensor in what get_image_features and get_text_features return: a record since transformers 5."""
    return getattr(features, "pooler_output", features)


def embedding_of(model, images):
    """The image embedding by transformers' own means."""
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            return pooled(model.get_image_features(images))
        if hasattr(model, "vision_proj"):
            return model.vision_proj(model.vision_model(images).last_hidden_state[:, 0])
        if hasattr(model, "visual_projection"):
            return model(images).image_embeds
        output = getattr(model, model.base_model_prefix, model)(images)
        return output.pooler_output if hasattr(model, "vision_model") else output.last_hidden_state[:, 0]


def images_for(model, count=3, dtype=torch.float32, seed=1):
    config = getattr(model.config, "vision_config", model.config)
    return torch.randn(count, 3, *2 * (config.image_size,), generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def assert_exact(model, bound, dtype=torch.float32, count=2):
    images = images_for(model, count, dtype)
    state = copy.deepcopy(model.state_dict())
    expected = embedding_of(model, images)
    with torch.no_grad():
        parts = rk.decompose(model, images)
        assert torch.equal(image_tower(model)(images), expected)
    units = parts.units()
    assert relative(units.sum(1), expected) < bound
    assert relative(parts.output, expected) < bound
    others = [index for index in range(len(parts.layout)) if index != 1]
    assert relative(units[:, others].sum(1), expected) > 10 * bound
    after = model.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)
    return parts


TRUE_WIDTHS = {
    "CLIP ViT-B-32": lambda: clip(512, width=768, heads=12, size=64, patch=32, hidden_act="quick_gelu"),
    "CLIP ViT-L-14": lambda: clip(768, width=1024, heads=16, size=28, patch=14, hidden_act="quick_gelu"),
    "SigLIP so400m-14": lambda: siglip(width=1152, heads=16, size=28, patch=14),
    "BLIP large": lambda: blip(256, width=1024, heads=16, size=32, patch=16),
    "ViT-L-16": lambda: make("ViTModel", ViTConfig(**vision(1024, 16, 32, 16))),
    "DINOv2-L-14": lambda: make("Dinov2Model", Dinov2Config(**vision(1024, 16, 28, 14))),
}


@pytest.mark.parametrize("name", TRUE_WIDTHS)
def test_true_widths(name):
    parts = assert_exact(TRUE_WIDTHS[name](), 1e-5)
    assert parts.layout.heads in (12, 16)


TINY = {
    "CLIPModel": clip,
    "ChineseCLIPModel": lambda: make(
        "ChineseCLIPModel",
        ChineseCLIPConfig(vision_config=vision(), text_config=TEXT, projection_dim=32),
    ),
    "FlavaImageModel": lambda: make("FlavaImageModel", transformers.FlavaImageConfig(**vision())),
    "OwlViTVisionModel": lambda: make("OwlViTVisionModel", transformers.OwlViTVisionConfig(**vision())),
    "CLIPVisionModelWithProjection": lambda: make(
        "CLIPVisionModelWithProjection", CLIPVisionConfig(**vision(), projection_dim=32)
    ),
    "SiglipModel": siglip,
    "BlipForImageTextRetrieval": blip,
    "ViTModel": lambda: make("ViTModel", ViTConfig(**vision())),
    "ViTForImageClassification": lambda: make("ViTForImageClassification", ViTConfig(**vision())),
    "DeiTModel": lambda: make("DeiTModel", DeiTConfig(**vision())),
    "Dinov2Model": lambda: make("Dinov2Model", Dinov2Config(**vision())),
    "Dinov2Model, SwiGLU": lambda: make("Dinov2Model", Dinov2Config(**vision(), use_swiglu_ffn=True)),
    "Dinov2WithRegistersModel": lambda: make(
        "Dinov2WithRegistersModel", Dinov2WithRegistersConfig(**vision(), num_register_tokens=3)
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_float64(name):
    model = TINY[name]().double()
    # Its softmax; ChineseCLIP had no other in version 4.
    in_float32 = model.config._attn_implementation == "eager"
    assert_exact(model, 1e-6 if in_float32 else 1e-12, torch.float64)
    view = towers.view(model)
    with torch.no_grad():
        assert view.embed(images_for(model, 1, torch.float64))[0].shape[1] - view.prefix == 4  # patches


def module(**parts) -> torch.nn.Module:
    """A module with these parts and plain attributes."""
    made = torch.nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def test_names_of_older_versions():
    """What transformers 4 called the parts of ViT, DeiT and DINOv2."""
    model = TINY["Dinov2Model"]().double()
    images = images_for(model, 2, torch.float64)
    expected = embedding_of(model, images)
    for layer in model.encoder.layer:
        new = layer.attention
        if hasattr(new, "attention"):
            continue  # this is such a version
        held = module(
            query=new.q_proj,
            key=new.k_proj,
            value=new.v_proj,
            num_attention_heads=3,
            scaling=0.25,
            config=new.config,
        )
        layer.attention = module(attention=held, output=module(dense=new.o_proj))
        intermediate = torch.nn.Sequential(layer.mlp.fc1, layer.mlp.activation_fn)
        layer.intermediate, layer.output = (
            intermediate,
            module(dense=layer.mlp.fc2, dropout=torch.nn.Dropout(0.0)),
        )
        del layer.mlp
    with torch.no_grad():
        parts = rk.decompose(model, images, check=False)  # these parts have no forward of their own
    assert relative(parts.units().sum(1), expected) < 1e-12
    model.encoder.layer[0].attention.attention.relative_position_bias = torch.nn.Linear(1, 1)
    with pytest.raises(
        rk.UnsupportedTowerError, match="attention of block 0 has unknown parts relative_position_bias"
    ):
        rk.decompose(model, images)


def test_attention_implementations():
    """eager and sdpa give the model's numbers; one that was registered is the one that runs."""
    model, calls = clip().double(), []
    images = images_for(model, 2, torch.float64)
    for name, bound in (("eager", 1e-6), ("sdpa", 1e-12)):  # its eager softmax is float32
        model.set_attn_implementation(name)
        assert_exact(model, bound, torch.float64)

    def counted(module, q, k, v, mask, scaling, **more):
        calls.append(q.shape[2])
        share = (q @ k.transpose(-1, -2) * scaling).softmax(-1)
        return (share @ v).transpose(1, 2).flip(2), None  # heads in another order: not the others' numbers

    transformers.AttentionInterface.register("counted", counted)
    expected = embedding_of(model, images)
    model.set_attn_implementation("counted")
    assert_exact(model, 1e-12, torch.float64)
    assert 1 in calls  # in the last block only the class token asks
    assert relative(embedding_of(model, images), expected) > 1e-3


def test_images_of_other_sizes():
    """DINOv2 interpolates its positions to any size; CLIP takes its own alone."""
    model = TINY["Dinov2Model"]().double()
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        parts = rk.decompose(model, images)
        assert relative(parts.units().sum(1), model(images).pooler_output) < 1e-12
    with pytest.raises(ValueError, match="takes images of 16 x 16"):
        rk.decompose(clip().double(), images)


def test_the_image_tower_is_made_of_the_models_parts():
    model = clip()
    tower = image_tower(model)
    assert image_tower(model) is tower
    assert image_tower(tower) is tower
    assert tower.layers[0] is model.vision_model.encoder.layers[0]
    assert isinstance(tower, ImageTower)
    assert not tower.training
    model.train()
    assert tower.training
    model.eval()
    twin = copy.deepcopy(model)
    assert image_tower(twin) is not tower
    assert towers.checksum(image_tower(twin)) == towers.checksum(tower)
    model.visual_projection = copy.deepcopy(model.visual_projection)
    assert image_tower(model).projection is model.visual_projection
    alone = make("CLIPVisionModelWithProjection", CLIPVisionConfig(**vision(), projection_dim=32))
    alone.load_state_dict(model.state_dict(), strict=False)  # the same weights are the same tower
    assert towers.checksum(image_tower(alone)) == towers.checksum(tower)
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_an_untrained_pooler_is_no_part_of_the_tower():
    """ViTModel.from_pretrained of a classifier draws a new pooler each time;
    bases and adapters must not notice."""
    model = TINY["ViTModel"]()
    before = towers.checksum(image_tower(model))
    torch.nn.init.normal_(model.pooler.dense.weight)
    assert towers.checksum(image_tower(model)) == before


def test_dropout_and_checkpointing():
    model = make("ViTModel", ViTConfig(**vision(), hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    rk.decompose(model, images_for(model))
    model.train()
    with pytest.raises(ValueError, match="dropout of attention weights, dropout of hidden states"):
        rk.decompose(model, images_for(model))
    model = TINY["ViTModel"]().train()
    residual = rk.ResiDual(model, rk.fit_bases(model, [images_for(model, 8)]))
    calls, grads = [], []
    image_tower(model).layers[0].layernorm_before.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        residual(images_for(model))  # the check of a tower that has changed
        images = images_for(model).requires_grad_()
        calls.clear()
        grads.append(torch.autograd.grad(residual(images).square().sum(), images)[0])
        assert len(calls) == 1 + checkpointing
    assert relative(grads[1], grads[0]) < 1e-5


def refused() -> dict:
    blip_config = BlipConfig(vision_config=vision(), text_config=BLIP_TEXT | {"encoder_hidden_size": 48})
    return {
        "BlipModel": (blip_config, "normalises its class token twice"),
        "CLIPForImageClassification": (
            CLIPConfig(vision_config=vision(), text_config=TEXT),
            "more than an embedding",
        ),
        "CLIPTextModel": (transformers.CLIPTextConfig(**TEXT), "lacks norm|is not an image tower"),
        "ViTMAEModel": (transformers.ViTMAEConfig(**vision()), "drops patches at random"),
        "Siglip2Model": (
            transformers.Siglip2Config(vision_config=vision(num_patches=4), text_config=SIGLIP_TEXT),
            "embeds more than",
        ),
        "ASTModel": (transformers.ASTConfig(**vision()), "no patches of colour images"),
        # since transformers 5
        **(
            {"PixioModel": (transformers.PixioConfig(**vision()), "several class tokens")}
            if hasattr(transformers, "PixioConfig")
            else {}
        ),
        "DPTModel": (transformers.DPTConfig(**vision()), "instead of the stream"),
        "BeitModel": (transformers.BeitConfig(**vision()), "is Identity, not LayerNorm"),
        "BertModel": (transformers.BertConfig(**TEXT), "lacks norm"),
        "ResNetModel": (
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]),
            "it has none of",
        ),
    }


@pytest.mark.parametrize("kind", refused())
def test_what_has_no_exact_units_is_told_why(kind):
    config, message = refused()[kind]
    model = getattr(transformers, kind)(config).eval()
    with pytest.raises(rk.UnsupportedTowerError, match=message):
        rk.decompose(model, torch.randn(1, 3, 16, 16))


def test_quantised_and_pruned_layers_are_refused():
    model = clip()
    model.vision_model.encoder.layers[1].self_attn.num_heads = 6
    with pytest.raises(rk.UnsupportedTowerError, match="layers with other heads"):
        rk.decompose(model, images_for(model))
    model = clip()
    out = model.vision_model.encoder.layers[1].self_attn.out_proj
    out.weight = torch.nn.Parameter(torch.zeros(48, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(rk.UnsupportedTowerError, match=r"block 1 is quantised \(torch.int8\)"):
        rk.decompose(model, images_for(model))


def test_the_whole_way(tmp_path):
    """Batches as transformers has them, a cache, a fit by prototypes, an adapter on disk.

    The model unchanged.
    """
    model = TINY["Dinov2Model"]()
    images = images_for(model, 48)
    labels = (embedding_of(model, images)[:, 0] > 0).long()
    batches = [
        transformers.BatchFeature({"pixel_values": x, "labels": y})
        for x, y in zip(images.split(16), labels.split(16), strict=True)
    ]
    before = model(images).last_hidden_state
    bases = rk.fit_bases(model, batches).truncate(energy=0.9)
    cache = rk.encode(model, batches, tmp_path / "cache")
    assert torch.equal(cache.labels, labels)
    residual = rk.ResiDual(model, bases)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    head = rk.ZeroShotHead.from_prototypes(cache)
    rk.fit(residual, head, cache, cache, epochs=2)
    expected = residual(images)
    assert relative(expected, embedding_of(model, images)) > 1e-3
    rk.save_adapter(residual, tmp_path / "adapter")
    assert isinstance(residual.detach(), ImageTower)
    assert all(p.requires_grad for p in model.encoder.parameters())
    assert torch.equal(model(images).last_hidden_state, before)
    assert torch.equal(rk.load_adapter(model, tmp_path / "adapter")(images), expected)
    assert (
        relative(rk.load_adapter(copy.deepcopy(model), tmp_path / "adapter").merge()(images), expected) < 1e-5
    )
    with pytest.raises(ValueError, match="needs its images under 'pixel_values'; got images, label"):
        rk.fit_bases(model, [{"images": images, "label": labels}])


def test_compiles_and_casts():
    model = clip()
    images = images_for(model)
    residual = rk.ResiDual(model, rk.fit_bases(model, [images_for(model, 20)]).truncate(energy=0.9))
    expected = residual(images)
    (grad,) = torch.autograd.grad(expected.square().sum(), residual.weight)
    compiled = torch.compile(lambda x: residual(x).square().sum(), fullgraph=True, backend="aot_eager")
    (again,) = torch.autograd.grad(compiled(images), residual.weight)
    assert relative(again, grad) < 1e-5
    twin = copy.deepcopy(residual).to(torch.bfloat16)
    assert twin.tower.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert residual.tower.layers[0].mlp.fc1.weight.dtype == torch.float32
    assert relative(twin(images.bfloat16()).float(), expected) < 0.05


def attached(model, images, **options):
    bases = rk.fit_bases(model, [images_for(model, 20, images.dtype, seed=3)]).truncate(energy=0.9)
    return rk.attach(model, bases, init="normal", **options)


def everything(output) -> dict[str, torch.Tensor]:
    """All tensors of a transformers output, nested ones too."""
    found = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            found |= {f"{name}.{inner}": tensor for inner, tensor in everything(value).items()}
    return found


@pytest.fixture
def float64_by_default():
    """transformers 4 cannot make a text mask in float64 otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_attached_to_a_clip_and_restored_exactly(float64_by_default):
    model = clip().double()
    images = images_for(model, 4, torch.float64)
    text = {
        "input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]),
        "attention_mask": torch.ones(2, 4).long(),
    }
    inputs = text | {"pixel_values": images}
    before, parts = everything(model(**inputs)), dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = list(model.state_dict())
    with attached(model, images) as handle:
        residual = handle.residual
        y, tokens = residual(images)
        inside = model(**inputs)
        normed = y / y.norm(dim=-1, keepdim=True)
        assert relative(pooled(model.get_image_features(images)), y) < 1e-12
        assert relative(inside.image_embeds, normed) < 1e-12
        logits = model.logit_scale.exp() * normed @ inside.text_embeds.T
        assert relative(inside.logits_per_image, logits) < 1e-12
        assert relative(inside.logits_per_image, before["logits_per_image"]) > 1e-3
        # the tokens are the tower's own
        assert (
            relative(
                inside.vision_model_output.last_hidden_state, before["vision_model_output.last_hidden_state"]
            )
            < 1e-12
        )
        assert torch.equal(tokens, inside.vision_model_output.last_hidden_state)
        assert model(**inputs, return_dict=False)[0].shape == (4, 2)
        assert pooled(model.get_image_features(images.float())).dtype == torch.float64  # cast, as without us
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits_per_image, inside.logits_per_image)
        for name in ("output_hidden_states", "interpolate_pos_encoding"):
            with pytest.raises(ValueError, match=f"{name} are not available while a ResiDual is attached"):
                model(**inputs, **{name: True})
        with pytest.raises(ValueError, match="attached to this model already"):
            rk.attach(model, residual.bases)
        with pytest.raises(ValueError, match="attached to this model already"):
            rk.decompose(model, images)
    assert dict(model.named_modules()) == parts
    assert list(model.state_dict()) == names
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    after = everything(model(**inputs))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert residual(images).shape == (4, 32)  # alone again, it returns y alone


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_attached_to_a_classifier(kind):
    """y stands where the classifier reads the class token."""
    config = getattr(transformers, f"{kind}Config")(**vision(), num_labels=5)
    model = make(f"{kind}ForImageClassification", config).double()
    images = images_for(model, 4, torch.float64)
    before = model(images).logits
    with attached(model, images) as handle:
        y, tokens = handle.residual(images)
        read = y if kind == "ViT" else torch.cat([y, tokens[:, 1:].mean(1)], dim=1)
        assert relative(model(images).logits, model.classifier(read)) < 1e-12
        assert relative(model(images).logits, before) > 1e-3
    assert torch.equal(model(images).logits, before)


@torch.no_grad()
def test_stream_inside_a_clip():
    """placement="stream" works in there too; merged, it is the model's own state_dict."""
    model = clip().double()
    images = images_for(model, 3, torch.float64)
    bases = rk.fit_bases(model, [images_for(model, 20, torch.float64)], placement="stream")
    names = set(model.state_dict())
    residual = rk.ResiDual(model, bases, placement="stream", init="normal")
    y = residual(images)
    with rk.attach(model, adapter=residual):
        assert relative(pooled(model.get_image_features(images)), y) < 1e-12
    residual.merge()
    assert set(model.state_dict()) == names
    assert relative(embedding_of(model, images), y) < 1e-10


def test_attach_refuses_and_changes_nothing():
    for model, message in (
        (blip(), "matches text with all image tokens"),
        (TINY["ViTModel"](), "no image tower at"),
    ):
        bases = rk.fit_bases(model, [images_for(model, 8)])
        modules = dict(model.named_modules())
        with pytest.raises(ValueError, match=message):
            rk.attach(model, bases)
        assert dict(model.named_modules()) == modules
        assert all(p.requires_grad for p in model.parameters())
    model, other = clip(), clip(seed=1)
    with pytest.raises(ValueError, match="another tower"):
        rk.attach(model, adapter=rk.CoarseHeads(other))
    handle = rk.attach(model, adapter=rk.CoarseHeads(model))
    model.visual_projection = torch.nn.Linear(48, 32)
    with pytest.raises(RuntimeError, match="visual_projection is no longer the module that was attached"):
        handle.detach()


def tokenizer():
    words = {
        word: index
        for index, word in enumerate(["<pad>", "<s>", "</s>", "<sep>", "a", "photo", "of", "cat", "dog"])
    }
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


@torch.no_grad()
def test_siglip_pools_by_attention():
    """Its MLP behind the pooling is one more unit, and y serves its own sigmoid logits when attached."""
    model = siglip().double()
    images = images_for(model, 3, torch.float64)
    parts = rk.decompose(model, images)
    assert parts.layout.kinds == ("emb", "head", "mlp", "pool")
    pooler = model.vision_model.head
    pooled = pooler.attention(
        pooler.probe.expand(3, -1, -1), *2 * (model.vision_model(images).last_hidden_state,)
    )[0]
    expected = pooler.mlp(pooler.layernorm(pooled))
    assert relative(parts.units(kind="pool"), expected) < 1e-12
    inputs = {"pixel_values": images, "input_ids": torch.tensor([[5, 6, 7]])}
    before = model(**inputs).logits_per_image
    with attached(model, images) as handle:
        y, _ = handle.residual(images)
        inside = model(**inputs)
        assert relative(inside.image_embeds, y / y.norm(dim=-1, keepdim=True)) < 1e-12
        assert relative(inside.logits_per_image, before) > 1e-3
    assert torch.equal(model(**inputs).logits_per_image, before)


@pytest.mark.parametrize("make_model", [clip, siglip, blip])
def test_class_vectors_from_text(make_model):
    model = make_model().train()
    templates = ("a photo of a {}", lambda name: f"a {name}")
    head = rk.ZeroShotHead.from_text(model, tokenizer(), ["cat", "dog"], templates)
    assert model.training
    model.eval()
    with torch.no_grad():
        for column, name in enumerate(["cat", "dog"]):
            vectors = []
            for text in (f"a photo of a {name}", f"a {name}"):
                padding = {"padding": "max_length", "max_length": 12} if make_model is siglip else {}
                inputs = tokenizer()([text], return_tensors="pt", **padding)  # one by one: no other padding
                inputs.pop("token_type_ids", None)
                if make_model is not blip:
                    vectors.append(pooled(model.get_text_features(**inputs))[0])
                else:
                    hidden = model.text_encoder(
                        inputs["input_ids"], inputs["attention_mask"]
                    ).last_hidden_state
                    vectors.append(model.text_proj(hidden[:, 0])[0])
            mean = sum(vector / vector.norm() for vector in vectors)
            assert relative(head.class_vectors[:, column], mean / mean.norm()) < 1e-5
    scale = 0.0 if make_model is blip else float(model.logit_scale.detach())
    assert float(head.logit_scale) == pytest.approx(scale)
    assert float(rk.ZeroShotHead.from_text(model, tokenizer(), ["cat"], logit_scale=1.5).logit_scale) == 1.5
    with pytest.raises(ValueError, match="ViTModel embeds no text; use ZeroShotHead.from_prototypes"):
        rk.ZeroShotHead.from_text(TINY["ViTModel"](), tokenizer(), ["cat"])


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    """hf: and a folder that holds a model, its image processor and its tokenizer."""
    folder, words = tmp_path / "model", tokenizer()
    clip(size=32).save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    pictures, labels = demo.digit_images()
    for index in range(40):
        place = tmp_path / "data" / ("cat" if labels[index] < 5 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        pictures[index].save(place / f"{index}.png")

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["residual-kernels", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr()

    shared = ("--model", f"hf:{folder}", "--data", tmp_path / "data")
    code, seen = run("fit", *shared, "--out", tmp_path / "adapter", "--method", "fine", "--epochs", 2)
    assert code == 0, seen.err
    code, seen = run("eval", *shared, "--adapter", tmp_path / "adapter")
    assert code == 0, seen.err
    model, preprocess, _ = load_model(f"hf:{folder}")
    assert preprocess(pictures[0]).shape == (3, 32, 32)
    assert pickle.loads(pickle.dumps(preprocess))(pictures[0]).equal(preprocess(pictures[0]))
    residual = rk.load_adapter(model, tmp_path / "adapter")
    assert residual(torch.stack([preprocess(picture) for picture in pictures[:2]])).shape == (2, 32)
    for arguments, message in (
        (("--model", f"hf:{tmp_path / 'nowhere'}"), "cannot be loaded"),
        (("--model", f"hf:{folder}", "--pretrained", "none"), "leave --pretrained out"),
    ):
        code, seen = run("bases", "--data", tmp_path / "data", "--out", tmp_path / "b", *arguments)
        assert code == 2
        assert message in seen.err
