"""The call: its inputs, outputs, batches, prompts and callbacks."""

import numpy as np
import pytest
import torch
from PIL import Image
from subjects import SIZE, mask, picture, same

EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_same_call(subject, pipe):
    """the same call gives the same images, another seed others"""
    images = subject.images(pipe)
    assert images.shape == (1, SIZE, SIZE, 3) and np.isfinite(images).all()
    assert np.array_equal(subject.images(pipe), images)
    assert not same(subject.images(pipe, generator=seeds(1)[0]), images)


def test_batch_is_single(subject, pipe):
    """a batch is what its images are alone"""
    prompts, images = ["a hat", "a much longer sentence on a red hat", "a cat"], [picture(i) for i in range(3)]
    batch = subject.images(pipe, prompt=prompts, image=images, mask_image=[mask()] * 3, generator=seeds(0, 1, 2))
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = subject.images(pipe, prompt=prompt, image=image, generator=seeds(i))
        assert same(batch[i : i + 1], alone, 1 / 255)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2])
def test_num_images_per_prompt(subject, pipe, prompts, copies):
    """num_images_per_prompt images come for each prompt"""
    problem = {"prompt": ["a hat"] * prompts, "image": [picture()] * prompts, "mask_image": [mask()] * prompts}
    assert len(subject.images(pipe, **problem, num_images_per_prompt=copies)) == prompts * copies


def test_tuple(subject, pipe):
    """the tuple of return_dict=False holds what the named output holds"""
    out, (images, flags) = subject.call(pipe), subject.call(pipe, return_dict=False)
    assert np.array_equal(out.images, images) and out.nsfw_content_detected is flags is None


def test_output_types(subject, pipe):
    """pil, np and pt are the same images; latent has the latents' shape"""
    images = subject.images(pipe)
    assert same(subject.images(pipe, output_type="pt").permute(0, 2, 3, 1), images)
    assert same(np.asarray(subject.images(pipe, output_type="pil")[0])[None] / 255, images, 0.51 / 255)
    assert subject.images(pipe, output_type="latent").shape == (1, 4, SIZE // 8, SIZE // 8)


def test_image_types(subject, pipe):
    """PIL images, arrays and tensors are the same input"""
    images = subject.images(pipe)
    array, painted = np.asarray(picture(), dtype=np.float32)[None] / 255, np.asarray(mask(), dtype=np.float32) / 255
    assert same(subject.images(pipe, image=array, mask_image=painted[None]), images)
    tensors = {"image": torch.tensor(array).permute(0, 3, 1, 2), "mask_image": torch.tensor(painted)[None, None]}
    assert same(subject.images(pipe, **tensors), images)


def test_image_latents(subject, pipe):
    """image and masked image may come as their latents"""
    with torch.no_grad():
        latents = pipe.vae.encode(torch.zeros(1, 3, SIZE, SIZE)).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert np.isfinite(subject.images(pipe, image=latents, masked_image_latents=latents)).all()


def test_latents_in(subject, pipe):
    """latents= replaces the drawn noise"""
    noise = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=seeds(5)[0])
    given = [subject.images(pipe, latents=latents) for latents in (noise, noise.clone(), -noise)]
    assert np.array_equal(given[0], given[1]) and not same(given[0], given[2])


def test_strength(subject, pipe):
    """strength shortens the run"""
    subject.call(pipe, num_inference_steps=8)
    whole = pipe.num_timesteps
    subject.call(pipe, num_inference_steps=8, strength=0.5)
    assert pipe.num_timesteps == whole / 2


def test_sizes(subject, pipe):
    """height and width are the images' size"""
    assert subject.images(pipe, height=24, width=48).shape == (1, 24, 48, 3)
    with pytest.raises(ValueError, match="divisible by 8"):
        subject.call(pipe, height=60)


def test_prompt_embeds(subject, pipe):
    """prompt embeddings stand in for the prompt"""
    embeds = pipe.encode_prompt("a hat", "cpu", 1, True, negative_prompt="a cat")
    by_embeds = subject.images(pipe, prompt=None, **dict(zip(EMBEDS, embeds, strict=True)))
    assert same(by_embeds, subject.images(pipe, negative_prompt="a cat"))
    assert not same(by_embeds, subject.images(pipe))


def test_prompt_and_embeds(subject, pipe):
    """a prompt beside its embeddings is refused, and so is none"""
    embeds, _ = pipe.encode_prompt("a hat", "cpu", 1, False)
    for given in ({"prompt_embeds": embeds}, {"prompt": None}):
        with pytest.raises(ValueError, match="prompt_embeds"):
            subject.call(pipe, **given)


def test_encode_prompt_alone(subject, parts):
    """encode_prompt needs only tokenizer and text encoder, and the rest needs neither"""
    words = {name: parts[name] if name in ("tokenizer", "text_encoder") else None for name in parts}
    embeds = subject.make(words).encode_prompt("a hat", "cpu", 1, True)
    pipe = subject.make({**parts, "tokenizer": None, "text_encoder": None})
    images = subject.images(pipe, prompt=None, **dict(zip(EMBEDS, embeds, strict=True)))
    assert same(images, subject.images(subject.make(parts)))


def test_no_guidance(subject, pipe):
    """guidance_scale <= 1 asks the UNet once, without the negative prompt"""
    batches = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, named: batches.append(len(named["encoder_hidden_states"])), with_kwargs=True
    )
    images = subject.images(pipe, guidance_scale=1.0)
    handle.remove()
    assert not pipe.do_classifier_free_guidance and set(batches) == {1}
    assert same(subject.images(pipe, guidance_scale=0.0, negative_prompt="a cat"), images)
    assert not same(subject.images(pipe), images)


@pytest.mark.stock_fails("it reaches the final layer norm through text_model, which transformers >= 5.6 has not")
def test_clip_skip(subject, pipe):
    """clip_skip takes an earlier layer of the text encoder"""
    images = subject.images(pipe)
    assert same(subject.images(pipe, clip_skip=0), images)
    assert not same(subject.images(pipe, clip_skip=1), images)
    assert pipe.clip_skip == 1 and not hasattr(pipe.text_encoder, "text_model")


def test_callback_reads(subject, pipe):
    """callbacks are handed every tensor that the class names, at every step in order"""
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), set(tensors)))
        return tensors

    names = pipe._callback_tensor_inputs
    subject.call(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [step for step, *_ in seen] == list(range(pipe.num_timesteps))
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert all(tensors == set(names) for *_, tensors in seen)


def test_callback_refuses(subject, pipe):
    """a tensor that the class does not name is refused"""
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        subject.call(pipe, callback_on_step_end_tensor_inputs=["sigmas"])


def test_callback_changes(subject, pipe):
    """callbacks change the latents and the prompt"""

    def clear(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    def other(pipe, step, timestep, tensors):
        return {"prompt_embeds": -tensors["prompt_embeds"]}

    assert not subject.images(pipe, callback_on_step_end=clear, output_type="latent").any()
    names = ["latents", "prompt_embeds"]
    changed = subject.images(pipe, callback_on_step_end=other, callback_on_step_end_tensor_inputs=names)
    assert not same(changed, subject.images(pipe), 1e-5)


def test_callback_guidance(subject, pipe):
    """callbacks change the guidance scale"""

    def rise(pipe, step, timestep, tensors):
        pipe._guidance_scale += 0.5
        return tensors

    slightly = {"guidance_scale": 1.25, "num_inference_steps": 8}
    changed = subject.images(pipe, **slightly, callback_on_step_end=rise)
    assert pipe.guidance_scale == 1.25 + 0.5 * pipe.num_timesteps
    assert not same(changed, subject.images(pipe, **slightly), 1e-5)


def test_callback_mask(subject, pipe):
    """callbacks change the mask, in place too"""

    def keep_all(pipe, step, timestep, tensors):
        return {"mask": torch.zeros_like(tensors["mask"])}

    def keep_all_in_place(pipe, step, timestep, tensors):
        tensors["mask"].zero_()
        return tensors

    names = {"callback_on_step_end_tensor_inputs": ["latents", "mask"]}
    changed = subject.images(pipe, callback_on_step_end=keep_all, **names)
    assert not same(changed, subject.images(pipe), 1e-3)
    assert same(subject.images(pipe, callback_on_step_end=keep_all_in_place, **names), changed)


def test_interrupt_with_changes(subject, pipe):
    """an interrupted call gives the latents as the callback changed them"""

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {"latents": torch.full_like(tensors["latents"], 0.5)}

    def stop_in_place(pipe, step, timestep, tensors):
        pipe._interrupt = True
        tensors["latents"].fill_(0.5)
        return tensors

    for callback in (stop, stop_in_place):
        assert (subject.images(pipe, callback_on_step_end=callback, output_type="latent") == 0.5).all()


def test_interrupt(subject, pipe):
    """an interrupted call ends early, with finite images"""
    calls = []

    def stop(pipe, step, timestep, tensors):
        calls.append(step)
        pipe._interrupt = True
        return tensors

    images = subject.images(pipe, callback_on_step_end=stop, num_inference_steps=8)
    assert calls == [0] and np.isfinite(images).all()
    assert subject.images(pipe).shape == images.shape and not pipe.interrupt


def test_padding_mask_crop(subject, pipe):
    """padding_mask_crop leaves what lies outside the crop"""
    painted = np.zeros((SIZE, SIZE), dtype=np.uint8)
    painted[8:16, 8:16] = 255
    out = subject.images(pipe, mask_image=Image.fromarray(painted), padding_mask_crop=4, output_type="pil")[0]
    assert np.array_equal(np.asarray(out)[:, 24:], np.asarray(picture())[:, 24:])
