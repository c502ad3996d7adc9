"""A stream from elsewhere: what others write is read, what is no stream is refused, and what goes out comes back."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

import rsdyn
from rsdyn.analysis.stored import flatten_part
from rsdyn.errors import UserError
from rsdyn.lm.source import find_lm
from rsdyn.stream.exchange.loading import NO_MID

N, L, D = 24, 3, 32
AXES = "trajectory sublayer unit"


@pytest.fixture(scope="module")
def texts():
    """Token ids: token 0 opens each, and few tokens end them, as a full stop does."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(N):
        ids = rng.integers(5, 300, size=int(rng.integers(6, 20)))
        found.append(np.concatenate([[1], ids, [3 + i % 2]]))
    return found


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModel.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def recorded(tiny_llama, texts):
    return rsdyn.record(str(tiny_llama), [ids.tolist() for ids in texts])


@pytest.fixture(scope="module")
def hidden(model, texts):
    """transformers' hidden_states of each text, ``(T, L + 1, D)``."""
    with torch.no_grad():
        return [
            torch.stack(model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states, dim=2)[0]
            for ids in texts
        ]


def same(x, y):
    return (
        torch.equal(x.tensor, y.tensor) and torch.equal(x.sequence, y.sequence) and torch.equal(x.position, y.position)
    )


# -- out and in again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["npz", "safetensors", "xarray"])
def test_what_goes_out_and_comes_back_has_the_same_findings_to_the_bit(tiny_llama, texts, tmp_path, stored, how):
    given = [ids.tolist() for ids in texts]
    x = rsdyn.record(str(tiny_llama), given, stored=stored, groups=["a", "b"] * (N // 2))
    if how == "xarray":
        pytest.importorskip("xarray")
        y = rsdyn.load(x.to_xarray())
    else:
        y = rsdyn.load(x.save(tmp_path / f"stream.{how}"))
    assert same(x, y) and y.tensor.dtype == x.tensor.dtype
    assert (y.sites, y.layers, y.groups, y.label, y.certificate) == (
        x.sites,
        x.layers,
        x.groups,
        x.label,
        x.certificate,
    )
    assert all(torch.equal(a, b) for a, b in zip(x.tokens, y.tokens, strict=True))
    measures = ["activations", "correlation", "cosine", "velocity"]
    one, two = (rsdyn.measure(z, controls=[], measures=measures) for z in (x, y))
    assert repr([row.values for row in one.findings]) == repr([row.values for row in two.findings])
    arrays, again = (flatten_part(found.results, "original") for found in (one, two))
    assert arrays.keys() == again.keys() and len(arrays) > 20
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


def test_every_token_of_each_comes_back_too(tiny_llama, texts, tmp_path):
    x = rsdyn.record(str(tiny_llama), [ids.tolist() for ids in texts], positions="all")
    assert same(x, rsdyn.load(x.save(tmp_path / "all.npz")))
    part = x[:7]
    assert same(part, rsdyn.load(part.save(tmp_path / "part.safetensors")))


def test_the_list_that_dsa_takes(recorded):
    (x,) = recorded.to_dsa()
    assert x.shape == (N, 2 * L, D) and x.dtype == np.float32 and np.array_equal(x, recorded.tensor.numpy())
    from dataclasses import replace

    grouped = replace(recorded, groups=tuple("ab" * (N // 2)))
    a, b = grouped.to_dsa()
    assert np.array_equal(a, x[::2]) and np.array_equal(b, x[1::2])


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_rows_of_ours_that_were_shuffled_or_changed_are_refused(recorded, tmp_path, suffix):
    path = recorded.save(tmp_path / f"stream.{suffix}")
    from rsdyn.stream.recorded import read_saved

    words, arrays = read_saved(path)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    cases = {"another order": {"tensor": arrays["tensor"][order].clone()}}
    cases["another order"] |= {"sequence": arrays["sequence"][order], "position": arrays["position"][order]}
    changed = arrays["tensor"].clone()
    changed[5, 0, 0] += 1
    cases["trajectory 5 is not the one"] = {"tensor": changed}
    for reason, wrong in cases.items():
        if suffix == "npz":
            np.savez(path, rsdyn=json.dumps(words), **{k: v.numpy() for k, v in {**arrays, **wrong}.items()})
        else:
            save_file({k: v.contiguous() for k, v in {**arrays, **wrong}.items()}, path, {"rsdyn": json.dumps(words)})
        with pytest.raises(UserError, match=reason):
            rsdyn.load(path)


# -- what others write -------------------------------------------------------------------------------------------------


def test_hidden_states_of_transformers(model, texts, hidden, recorded, tiny_llama):
    """The embedding and what is behind each layer, but for the last, which stands behind the final norm."""
    width = max(map(len, texts))
    ids = torch.tensor([[*t, *[0] * (width - len(t))] for t in (t.tolist() for t in texts)])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    x = rsdyn.load(states, mask=mask, tokens=[t.tolist() for t in texts], model=str(tiny_llama))
    assert x.sites == ("resid_pre",) * L and x.layers == (0, 1, 2) and x.notes == (NO_MID,)
    assert torch.allclose(x.tensor, recorded.tensor[:, ::2], atol=1e-5)
    assert x.position.tolist() == [len(t) - 1 for t in texts]
    every = rsdyn.load(states, mask=mask, tokens=[t.tolist() for t in texts], positions="all")
    assert len(every) == sum(map(len, texts)) and torch.equal(every.tensor[0, 1], states[1][0, 0])
    one = rsdyn.load(tuple(s[0, : len(texts[0])] for s in states))
    assert torch.equal(one.tensor[0], x.tensor[0])


def vllm_folder(folder, texts, hidden, layers=range(L)):
    """A file for each request, as vLLM's page on the extraction of hidden states documents it."""
    folder.mkdir()
    for i, (ids, states) in enumerate(zip(texts, hidden, strict=True)):
        arrays = {"hidden_states": states[:, list(layers)].contiguous(), "token_ids": torch.from_numpy(ids)}
        save_file(arrays, folder / f"request-{i:03d}.safetensors")
    return folder


def test_a_folder_of_vllm(tmp_path, texts, hidden, recorded, tiny_llama):
    folder = vllm_folder(tmp_path / "vllm", texts, hidden)
    with pytest.raises(UserError, match=r"do not say which layers .*eagle_aux_hidden_state_layer_ids.*stream\.json"):
        rsdyn.load(folder)
    (folder / "stream.json").write_text(json.dumps({"layers": L, "label": "Tiny"}))
    x = rsdyn.load(folder, model=str(tiny_llama))
    assert x.label == "Tiny" and torch.allclose(x.tensor, recorded.tensor[:, ::2], atol=1e-5)
    found = rsdyn.measure(x, controls=[], measures=["correlation", "cosine"])
    assert NO_MID in found.notes
    with pytest.raises(UserError, match="2 layers are declared and 3 are there"):
        rsdyn.load(folder, layers=[0, 2])
    one = rsdyn.load(folder / "request-003.safetensors", layers=L, positions="all")
    assert len(one) == len(texts[3]) and torch.equal(one.tokens[0], torch.from_numpy(texts[3]))
    some = rsdyn.load(vllm_folder(tmp_path / "some", texts, hidden, [1, 2]), layers=[1, 2], model=str(tiny_llama))
    assert some.layers == (1, 2) and any("Not every layer is there (layers 1, 2)" in note for note in some.notes)


def lens_cache(tiny_llama, texts, *, sites=("resid_pre", "resid_mid"), wrapped=True):
    """What TransformerLens keeps of equally long texts: states by the names of its hooks."""
    lm = find_lm(str(tiny_llama)).load()
    n = min(map(len, texts))
    ids = [t[:n] for t in texts]
    at = [np.arange(n)] * len(ids)
    states = lm.record(ids, positions=at).view(len(ids), n, 2 * L, D)
    names = [(i, site) for i in range(L) for site in ("resid_pre", "resid_mid")]
    cache = {f"blocks.{i}.hook_{s}": states[:, :, k] for k, (i, s) in enumerate(names) if s in sites}
    cache |= {"hook_embed": states[:, :, 0], "blocks.0.hook_resid_post": states[:, :, 2]}
    return (SimpleNamespace(cache_dict=cache) if wrapped else cache), ids, states


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_cache_of_transformer_lens(tiny_llama, texts, wrapped):
    cache, ids, states = lens_cache(tiny_llama, texts, wrapped=wrapped)
    x = rsdyn.load(cache, tokens=ids, model=str(tiny_llama))
    assert x.sites == ("resid_pre", "resid_mid") * L and x.notes == ()
    assert torch.equal(x.tensor, states[:, -1])
    half, _, _ = lens_cache(tiny_llama, texts, sites=("resid_pre",))
    y = rsdyn.load(half, tokens=ids)
    assert torch.equal(y.tensor, states[:, -1, ::2]) and NO_MID in y.notes
    with pytest.raises(UserError, match=r"no blocks\.0\.hook_resid_pre"):
        rsdyn.load({"hook_embed": states[:, :, 0]})


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("axes", [AXES, "unit trajectory layer site"])
def test_arrays_with_declared_axes(recorded, tmp_path, suffix, axes, tiny_llama):
    x = recorded.tensor
    array = (x if axes == AXES else x.view(N, L, 2, D).permute(3, 0, 1, 2)).contiguous()
    path = tmp_path / f"acts.{suffix}"
    if suffix == "npy":
        np.save(path, array.numpy())
    elif suffix == "npz":
        np.savez(path, acts=array.numpy())
    else:
        save_file({"acts": array}, path)
    with pytest.raises(UserError, match=r"nothing says what this array .* Give axes and sites, or a JSON file beside"):
        rsdyn.load(path)
    said = {"axes": axes.split(), "sites": ["resid_pre", "resid_mid"], "label": "mine"}
    said |= {"tokens": [ids.tolist() for ids in recorded.tokens]}
    (tmp_path / "acts.json").write_text(json.dumps(said))
    y = rsdyn.load(path, model=str(tiny_llama))
    assert torch.equal(y.tensor, x) and y.label == "mine" and y.position.tolist() == recorded.position.tolist()
    assert rsdyn.load(path, label="other").label == "other"


# -- seven corruptions -------------------------------------------------------------------------------------------------


def given(hidden, texts, choose=lambda states: states[-1], **more):
    """Last tokens of each text as an array of its own, with tokens."""
    x = torch.stack([choose(states) for states in hidden])
    return {"source": x, "axes": AXES, "sites": "resid_pre", "tokens": [t.tolist() for t in texts], **more}


@pytest.mark.parametrize("with_model", [False, True])
def test_the_last_state_behind_the_final_norm(hidden, texts, tiny_llama, with_model):
    more = {"model": str(tiny_llama)} if with_model else {}
    with pytest.raises(UserError, match="final norm"):
        rsdyn.load(**given(hidden, texts, **more))
    rsdyn.load(**given([h[:, :-1] for h in hidden], texts, **more))
    if with_model:  # as many layers as the model has, and too few rows to see it in
        with pytest.raises(UserError, match=r"off by one layer: .* the last behind the final norm"):
            rsdyn.load(**given([h[:, 1:] for h in hidden[:2]], texts[:2], **more))
        last_normed = [torch.cat([h[:, : L - 1], h[:, L:]], dim=1) for h in hidden[:2]]
        with pytest.raises(UserError, match=r"All but the last state agree: the last stands behind the final norm"):
            rsdyn.load(**given(last_normed, texts[:2], **more))


@pytest.mark.parametrize(("factor", "spread", "is_refused"), [(0.1, 0.1, True), (0.8, 0.1, False), (2, 0.001, True)])
def test_a_norm_shortens_states_or_makes_them_equally_long(factor, spread, is_refused):
    """As SmolLM2's final norm does, whose spread stays, and as the embedded model's; a step of a sum does neither."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, D, generator=generator).cumsum(1) + 5
    direction = torch.nn.functional.normalize(x[:, -1], dim=-1)
    length = factor * x[:, -2].norm(dim=-1).median() * torch.exp(spread * torch.randn(40, generator=generator))
    x[:, -1] = direction * length[:, None]
    if is_refused:
        with pytest.raises(UserError, match="final norm"):
            rsdyn.load(x, axes=AXES, sites="resid_pre")
    else:
        assert len(rsdyn.load(x, axes=AXES, sites="resid_pre")) == 40


@pytest.mark.parametrize("with_model", [False, True])
def test_off_by_one_layer(hidden, texts, tiny_llama, with_model):
    more = {"model": str(tiny_llama), "layers": [0, 1]} if with_model else {}
    with pytest.raises(UserError, match=r"off by one layer.* hidden_states\[1\]"):
        rsdyn.load(**given([h[:, 1:-1] for h in hidden], texts, **more))
    if with_model:  # each token once: only the model can tell
        once = [i for i, t in enumerate(texts) if i < 2]
        with pytest.raises(UserError, match="off by one layer: these are the outputs of the layers"):
            rsdyn.load(**given([hidden[i][:, 1:-1] for i in once], [texts[i] for i in once], **more))


@pytest.mark.parametrize("known", ["tokens", "states"])
def test_two_bos(model, texts, known):
    doubled = [np.concatenate([[1], t]) for t in texts]
    width = min(map(len, doubled))
    ids = torch.tensor(np.stack([t[:width] for t in doubled]))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    more = {"tokens": ids} if known == "tokens" else {}
    with pytest.raises(UserError, match=r"begins with .* twice: two BOS"):
        rsdyn.load(states, **more)


def test_two_bos_that_the_tokens_do_not_show(hidden, model, texts, tiny_llama):
    with torch.no_grad():
        states = [
            torch.stack(
                model(torch.from_numpy(np.concatenate([[1], t]))[None], output_hidden_states=True).hidden_states, dim=2
            )[0, -1, :-1]
            for t in texts
        ]
    with pytest.raises(UserError, match="It has seen the first token twice: two BOS"):
        rsdyn.load(**given([s[None] for s in states], texts, model=str(tiny_llama)))


@pytest.mark.parametrize("known", ["mask", "tokens", "states"])
@pytest.mark.parametrize("pad", [0, 1])
def test_padding_on_the_left(model, texts, known, pad):
    """With a token of its own, and with the one that opens each text, as where pad is BOS."""
    width = max(map(len, texts))
    ids = torch.tensor([[*[pad] * (width - len(t)), *t] for t in (t.tolist() for t in texts)])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    more = {"mask": {"mask": mask}, "tokens": {"tokens": ids}, "states": {}}[known]
    with pytest.raises(UserError, match="padding on the left"):
        rsdyn.load(states, **more)


def test_one_half_of_the_sublayers_is_said_and_not_refused(recorded):
    x = rsdyn.load(recorded.tensor[:, ::2], axes=AXES, sites="resid_pre")
    assert NO_MID in x.notes and x.sites_per_layer == 1
    found = rsdyn.measure(x, controls=[], measures=["correlation", "velocity"])
    assert NO_MID in found.notes
    assert not any("within" in row.key or "cross" in row.key for row in found.findings if row.values)
    with pytest.raises(UserError, match=r"one half of the sublayers is missing: declare sites=\[resid_pre\]"):
        rsdyn.load(recorded.tensor[:, ::2], axes=AXES, sites=["resid_pre", "resid_mid"], layers=L)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_infinities_of_float16(recorded, dtype):
    x = recorded.tensor.clone()
    x[5, 2, 7] = 1e5
    x = x.half().to(dtype)
    with pytest.raises(UserError, match=r"sequence 5, token 0, at sublayer 2 is inf in unit 7.*65,504.*bfloat16"):
        rsdyn.load(x, axes=AXES, sites=["resid_pre", "resid_mid"])


@pytest.mark.parametrize("with_model", [False, True])
def test_shuffled_rows(hidden, texts, tiny_llama, with_model):
    order = np.random.default_rng(1).permutation(N)
    more = {"model": str(tiny_llama)} if with_model else {}
    with pytest.raises(UserError, match="shuffled"):
        rsdyn.load(**given([hidden[i][:, :-1] for i in order], texts, **more))
    if with_model:  # among texts that end in one token the embedding says nothing
        even = [i for i in range(N) if i % 2 == 0]
        moved = [*even[1:], even[0]]
        rows = {**given([hidden[i][:, :-1] for i in moved], [texts[i] for i in even], **more), "compared": len(even)}
        with pytest.raises(UserError, match="Each state is another sequence's: the rows were shuffled"):
            rsdyn.load(**rows)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"axes": "trajectory sublayer"}, "one is unit"),
        ({"axes": "trajectory sublayer unitt"}, "'unitt' cannot be. Axes are of"),
        ({"axes": "token sublayer unit"}, "rows are trajectory"),
        ({"axes": "sequence token sublayer unit"}, "it has 3 axes .* and 4 are declared"),
        ({"sites": ["resid_mid"]}, "a layer has resid_pre"),
        ({"layers": [0, 2, 1]}, "numbers from 0 on that rise"),
        ({"layers": 4}, "it has 6 sublayers, and 4 layers of 2 sites are declared, 8"),
        ({"tokens": "words"}, "lists of ids"),
        ({"tokens": [[1, 2]] * 3}, "tokens of 3 sequences are declared, and there are 24"),
        ({"position": [0, 1]}, "position is .2,., and there are 24"),
        ({"sequence": [0, 1] * 12}, "stand together"),
        ({"texts": ["a"]}, "texts: 1 of them"),
        ({"groups": ["a"] * 3}, "groups: 3 of them"),
        ({"positions": "first"}, "give last or all"),
    ],
)
def test_what_is_declared_and_cannot_be(recorded, change, match):
    right = {"axes": AXES, "sites": ["resid_pre", "resid_mid"]}
    with pytest.raises(UserError, match=match) as caught:
        rsdyn.load(recorded.tensor, **{**right, **change})
    assert "\n" not in str(caught.value)


def test_another_model_than_declared(recorded, tmp_path, tiny_llama):
    from tiny_models import tiny_lm

    tokens = [ids.tolist() for ids in recorded.tokens]
    right = {"axes": AXES, "sites": ["resid_pre", "resid_mid"], "tokens": tokens}
    other = tiny_lm(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"differs from other.* Another model, another revision"):
        rsdyn.load(recorded.tensor, **right, model=str(other))
    with pytest.raises(UserError, match=r"it has 16 units and .* has 32: another model's"):
        rsdyn.load(recorded.tensor[..., :16], **right, model=str(tiny_llama))
    with pytest.raises(UserError, match=r"nothing can be compared"):
        rsdyn.load(recorded.tensor, axes=AXES, sites=right["sites"], model=str(tiny_llama))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.txt", "nowhere.npy", "folder"])
def test_what_is_no_stream(tmp_path, name):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif not name.startswith("nowhere"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError) as caught:
        rsdyn.load(tmp_path / name, axes=AXES, sites="resid_pre")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_kinds_that_are_not_taken(recorded, tmp_path):
    with pytest.raises(TypeError, match="int is not taken"):
        rsdyn.load(3)
    with pytest.raises(UserError, match=r"generate\(\)"):
        rsdyn.load(((recorded.tensor,), (recorded.tensor,)))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as an array"):
        rsdyn.load(tmp_path / "objects.npy", axes=AXES, sites="resid_pre")
    (tmp_path / "acts.json").write_text('{"axis": 3}')
    np.save(tmp_path / "acts.npy", recorded.tensor.numpy())
    with pytest.raises(UserError, match=r"acts\.json: 'axis' is not known; did you mean axes\?"):
        rsdyn.load(tmp_path / "acts.npy")
