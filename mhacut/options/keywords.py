"""Keyword arguments of mhacut's functions; written by ``python -m mhacut.options.generate``."""

# fmt: off
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class ModelKeywords(TypedDict, total=False):
    """Architecture of checkpoints that do not state it, and the part of them that holds the model."""
    model: str | None
    """timm architecture, if the file does not state it."""
    model_args: Mapping[str, Any]
    """Arguments of that architecture, such as img_size=32 depth=6. Default: {}."""
    part: str | None
    """Part of a training checkpoint that holds the model: state_dict, student, backbone, ..."""


class DeviceKeywords(TypedDict, total=False):
    """Device that computes."""
    device: str
    """auto, cpu, cuda or cuda:N. Default: 'auto'."""


class BenchKeywords(ModelKeywords, DeviceKeywords, total=False):
    """Options of ``mhacut bench``."""
    runtime: Literal["eager", "compile", "onnx", "openvino"]
    """PyTorch without compilation, torch.compile, ONNX Runtime, or OpenVINO. Default: 'eager'."""
    int8: bool
    """Time each checkpoint in INT8 too, with the dynamic quantization of ONNX Runtime. Default: False."""
    batch_sizes: tuple[int, ...]
    """Images per batch. Default: (1, 8)."""
    seconds: float
    """Time to measure per batch size, for all checkpoints together. Default: 5.0."""
    threads: int | None
    """CPU threads; by default torch's own choice."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Precision of the computation. Default: 'float32'."""
    fused: bool
    """Use fused attention where a layer can. Default: True."""


class CheckpointKeywords(ModelKeywords, total=False):
    """Checkpoint, and facts that its file does not state."""
    num_classes: int | None
    """Refuse a dense model whose classifier has not N classes; 0 leaves the classifier out."""


class ImageSourceKeywords(TypedDict, total=False):
    """Source of images."""
    data_dir: str | os.PathLike[str] | None
    """Folder with train/ and val/, a folder of class folders or, where no labels are needed, of images."""
    dataset: str | None
    """Dataset by its name in timm: hfds/NAME, wds/NAME, tfds/NAME, torch/NAME."""


class LabelledImagesKeywords(ImageSourceKeywords, total=False):
    """Source of images to measure accuracy on."""
    class_map: str | os.PathLike[str] | None
    """Text file with the class names in the order of the model's head."""
    val_split: str
    """Split to measure accuracy on. Default: 'val'."""
    workers: int | None
    """Processes that load images; by default 2, or 1 where there is only one CPU."""


class PreprocessingKeywords(TypedDict, total=False):
    """Overrides of the checkpoint's own preprocessing; None keeps the checkpoint's value."""
    mean: tuple[float, ...] | None
    """Mean per channel, for pixels in 0..1; by default the model's own."""
    std: tuple[float, ...] | None
    """Standard deviation per channel; by default the model's own."""
    crop_pct: float | None
    """Share of the image that the centre crop keeps."""
    interpolation: str | None
    """Interpolation on resizing: bicubic, bilinear, ..."""
    img_size: int | None
    """Height and width in pixels."""


class EvaluateKeywords(
    CheckpointKeywords,
    DeviceKeywords,
    LabelledImagesKeywords,
    PreprocessingKeywords,
    total=False,
):
    """Options of ``mhacut evaluate``."""
    batch_size: int
    """Images per batch. Default: 64."""
    amp: bool
    """Compute under bfloat16 autocast. Default: False."""


class QuantizationImagesKeywords(ImageSourceKeywords, total=False):
    """Images to compare INT8 with float32 on; without any, the two are compared on noise."""
    train_split: str
    """Split to take images from. Default: 'train'."""
    calibration_images: int
    """Number of images to look for outliers on; a quarter of them is held out for the comparison with
    float32. Default: 256."""


class ExportKeywords(CheckpointKeywords, QuantizationImagesKeywords, total=False):
    """Options of ``mhacut export``."""
    format: Literal["onnx", "pt2", "openvino", "timm"]
    """ONNX for ONNX Runtime and others, pt2 for torch.export.load, OpenVINO IR (.xml and .bin), or a folder
    for timm and the hub. Default: 'onnx'."""
    output: str | os.PathLike[str] | None
    """File or folder to write; by default named after the checkpoint and the format, in the working
    directory."""
    overwrite: bool
    """Replace an existing file; the checkpoint is never replaced. Default: False."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Precision of the weights; images and logits are always float32. Default: 'float32'."""
    fixed_batch: int | None
    """Images per batch; by default any number."""
    license: str | None
    """License to state in the model card, by its name on the hub (apache-2.0, mit, ...); by default the one
    that the checkpoint states, if any."""
    push_to_hub: str | None
    """Push the folder to this repository on the Hugging Face hub; the repository is created if it does not
    exist."""
    private: bool
    """If the repository is created, make it private. Default: False."""
    opset: int
    """ONNX opset. Default: 18."""
    int8: bool
    """Quantize the weights of linear layers to INT8, and compare speed, size and outputs with float32.
    Default: False."""
    reduce_range: bool
    """Quantize weights to 7 bits; with 8 bits, sums overflow on x86 CPUs without VNNI. Default: False."""
    threads: int | None
    """CPU threads to time INT8 with; by default torch's own choice."""


class TeacherKeywords(TypedDict, total=False):
    """Teacher that the model learns from besides labels."""
    teacher: str | os.PathLike[str] | None
    """Checkpoint of the dense model, or of any model with the same classes, to learn from; labels are then
    optional."""
    teacher_model: str | None
    """timm architecture of the teacher, if its file does not state it; by default that of the dense model."""
    teacher_model_args: Mapping[str, Any]
    """Arguments of that architecture. Default: {}."""
    teacher_part: str | None
    """Part of a training checkpoint that holds the teacher: state_dict, student, backbone, ..."""
    label_weight: float
    """Weight of the cross-entropy with labels relative to the distillation loss; 1 without a teacher.
    Default: 0.1."""
    kd_temperature: float
    """Temperature that divides the logits of both models before they are compared. Default: 1.0."""
    feature_weight: float
    """Weight of the squared error between the blocks' outputs, relative to their variance. Default: 0.0."""


class DataKeywords(LabelledImagesKeywords, total=False):
    """Source of images to measure accuracy on, and of those to calibrate or train on."""
    train_split: str
    """Split to calibrate or train on. Default: 'train'."""


class TrainingKeywords(TypedDict, total=False):
    """Training of the weights."""
    epochs: int
    """Passes over the training images. Default: 10."""
    steps: int | None
    """Optimiser steps in all, instead of epochs."""
    batch_size: int
    """Images per batch and process. Default: 64."""
    grad_accum_steps: int
    """Batches per optimiser step. Default: 1."""
    opt: str
    """Optimiser, by its name in timm. Default: 'adamw'."""
    lr: float
    """Highest learning rate. Default: 0.0001."""
    weight_decay: float
    """Weight decay; not applied to biases, norms and the parameters that the model exempts. Default: 0.05."""
    sched: Literal["cosine", "poly", "step", "tanh", "constant"]
    """Learning rate schedule. Default: 'cosine'."""
    warmup_epochs: float
    """Epochs of warmup, in which the learning rate rises. Default: 0.0."""
    clip_grad: float | None
    """Largest norm of the gradient; 0 for no limit. Default: 1.0."""
    model_ema: bool
    """Evaluate and save a moving average of the weights. Default: False."""
    seed: int
    """Random seed. Default: 42."""
    momentum: float
    """Momentum, for optimisers that have it. Default: 0.9."""
    layer_decay: float | None
    """Factor by which the learning rate falls from each layer to the one before it."""
    drop_path: float
    """Stochastic depth rate of the last block; earlier blocks have lower rates. Default: 0.0."""
    warmup_lr: float
    """Learning rate at the start of the warmup. Default: 1e-06."""
    min_lr: float
    """Learning rate at the end of the schedule. Default: 1e-06."""
    decay_epochs: float
    """Epochs between decays of the step schedule. Default: 30.0."""
    decay_rate: float
    """Factor of each decay of the step schedule; power of the poly schedule. Default: 0.1."""
    clip_mode: Literal["norm", "value", "agc"]
    """Gradient clipping by norm, by value, or adaptive. Default: 'norm'."""
    model_ema_decay: float
    """Decay of the moving average, per step. Default: 0.9998."""
    model_ema_warmup: bool
    """Let the moving average forget faster at the start. Default: True."""


class AugmentationKeywords(TypedDict, total=False):
    """Variation of training images by timm's transforms; validation images are never varied."""
    aug: bool
    """Augment training images; off: they are preprocessed as for validation, and only mixup and cutmix change
    them. Default: True."""
    aa: str | None
    """AutoAugment policy, rand-m9-mstd0.5-inc1."""
    mixup: float
    """Alpha of mixup; 0 for none. Default: 0.0."""
    cutmix: float
    """Alpha of cutmix; 0 for none. Default: 0.0."""
    scale: tuple[float, ...]
    """Smallest and largest share of the area that a random crop keeps. Default: (0.5, 1.0)."""
    ratio: tuple[float, ...]
    """Smallest and largest aspect ratio of a random crop. Default: (0.75, 1.3333333333333333)."""
    hflip: float
    """Probability of a horizontal flip; use 0 if left and right mean different things. Default: 0.5."""
    vflip: float
    """Probability of a vertical flip. Default: 0.0."""
    color_jitter: float
    """Strength of changes of brightness, contrast and saturation; unused with an AutoAugment policy. Default:
    0.0."""
    reprob: float
    """Probability of erasing a rectangle. Default: 0.0."""
    remode: Literal["const", "rand", "pixel"]
    """Contents of an erased rectangle. Default: 'pixel'."""
    recount: int
    """Largest number of erased rectangles per image. Default: 1."""
    mixup_prob: float
    """Probability that mixup or cutmix is applied in a step. Default: 1.0."""
    mixup_switch_prob: float
    """Probability of cutmix rather than mixup, if both are on. Default: 0.5."""
    smoothing: float
    """Label smoothing. Default: 0.0."""
    train_interpolation: str | None
    """Interpolation of random crops; by default the model's own."""


class FinetuneKeywords(
    DeviceKeywords,
    TeacherKeywords,
    DataKeywords,
    TrainingKeywords,
    AugmentationKeywords,
    PreprocessingKeywords,
    total=False,
):
    """Options of ``mhacut finetune``."""
    output: str | os.PathLike[str] | None
    """Directory of the run; by default the file's name without its ending, plus -finetuned, in the working
    directory."""
    overwrite: bool
    """Start again in a directory that already holds a run, which stays until the new one is first saved; the
    slim file is never replaced. Default: False."""
    resume: str | os.PathLike[str] | None
    """Continue the run in this directory, with the options it was started with."""
    save_every: int
    """Steps between saves within an epoch; 0 saves only at the end of each epoch. Default: 0."""
    labels: bool
    """Learn from labels if there are any; off: from the teacher alone. Accuracy is measured either way.
    Default: True."""
    eval_images: int | None
    """Validation images to measure accuracy on; all by default, 0 for none."""
    amp: bool
    """Train in mixed precision; accuracy is measured in float32. Default: False."""
    compile: bool
    """Compile the model with torch.compile. Default: False."""
    log: str | None
    """Logs to write besides summary.csv: png, tensorboard or wandb, or several, separated by commas."""
    dtype: Literal["float32", "bfloat16", "float16"] | None
    """Precision of the weights that are written; by default the slim file's."""
    amp_dtype: Literal["bfloat16", "float16"]
    """Type of mixed precision; float16 needs CUDA. Default: 'bfloat16'."""
    grad_checkpointing: bool
    """Recompute activations in the backward pass to save memory. Default: False."""
    channels_last: bool
    """Use the channels-last memory format, for convolutions. Default: False."""
    deterministic: bool
    """Refuse CUDA kernels that sum in random order; runs on the CPU are always repeatable. Default: False."""


class InspectKeywords(
    CheckpointKeywords,
    ImageSourceKeywords,
    DeviceKeywords,
    PreprocessingKeywords,
    total=False,
):
    """Options of ``mhacut inspect``."""
    layer: str | None
    """Show only layers whose names match, head by head: 'blocks.1*.attn'."""
    heads: bool
    """Show every head, and the channels it keeps or would keep at 75, 50, 25 %. Default: False."""
    sort: Literal["layer", "flops", "params", "qk", "v", "similarity", "rank"]
    """Order of the layers: as in the model (layer), or by any other figure, the largest first. Default:
    'layer'."""
    shapes: bool
    """Show widths and costs from the file's header alone, without reading weights. Default: False."""
    html: str | os.PathLike[str] | None
    """Write the report as one HTML page that needs no network."""
    overwrite: bool
    """Replace existing files. Default: False."""
    compare: str | os.PathLike[str] | None
    """Compare layer by layer with the dense model that this one was pruned from; on synthetic images if none
    are given."""
    train_split: str
    """Split to take images from. Default: 'train'."""
    calibration_images: int | None
    """Number of images to assess heads on; 64 by default."""
    seed: int
    """Random seed of the choice of images. Default: 42."""
    batch_size: int
    """Images per batch. Default: 16."""


class TargetKeywords(TypedDict, total=False):
    """Budgets, all of which are met, or bounds on the loss, within which the smallest model is found."""
    params: str | None
    """Budget of parameters: 2.8M or 50%. Several kinds of budget can be combined; all are met."""
    size: str | None
    """Budget for the size of the written file: 6MB, 5.5MiB or 50%, in the checkpoint's dtype."""
    max_latency: str | None
    """Budget for the time per batch: 12ms, or 50% of the dense model's time. The pruned model is timed beside
    the dense one, on the device and under the conditions that the options of latency state."""
    max_kl: float | None
    """Find the smallest model whose outputs have at most this KL divergence, in nats, from those of the dense
    model on the held-out calibration images."""
    max_drop: float | None
    """Find the smallest model that loses at most this many points of top-1 accuracy on the labelled
    validation images."""
    exclude: tuple[str, ...]
    """Do not prune layers or units whose names match: 'blocks.0.*', '*.attn.qk'. Can be repeated. Default:
    ()."""
    min_width: tuple[str, ...]
    """Keep at least N channels per head, or in an MLP, where names match: 'blocks.*.mlp=256'. Can be
    repeated. Default: ()."""
    equal_qkv: bool
    """Keep the q/k and v widths of each layer equal, for fused attention in TensorRT and ONNX Runtime.
    Default: False."""


class SearchKeywords(TypedDict, total=False):
    """Search for the plan; every ingredient can be switched off for ablation."""
    method: Literal["mhacut", "paper"]
    """Ingredients of the search: those of mhacut, or those of the paper (arXiv 2405.20867), which is
    --allocation indicator --selection indicator --no-repair --heal-steps 0; other options override it.
    Default: 'mhacut'."""
    effort: Literal["fast", "balanced", "best"]
    """Amount of work: for a DeiT-S on two cores, fast takes 45 s, balanced 2 minutes, best 6. Default:
    'balanced'."""
    batch_size: int
    """Images per batch. Default: 16."""
    seed: int
    """Random seed. Default: 42."""
    allocation: Literal["curves", "indicator", "uniform"]
    """Division of the budget among layers: by sensitivity curves (curves), by trained indicators as in the
    paper (indicator), or uniformly (uniform). Default: 'curves'."""
    basis: Literal["auto", "channel", "principal"]
    """Channels to choose from: the model's own (channel), principal components where that is exact
    (principal), or, per layer, those that leave the smaller error on held-out images (auto). Default:
    'auto'."""
    positions: Literal["auto", "own", "equal"]
    """Kept v channels of heads that share convolution filters: each head its own, with its own copy of the
    filters (own), the same positions in all heads (equal), or, per layer, the choice that leaves the smaller
    error on held-out images (auto). Default: 'auto'."""
    repair: bool
    """Refit by least squares the weights that read the output of a pruned layer. Default: True."""
    heal_steps: int | None
    """Training steps per block of the pruned model, in order, to reproduce the output of the dense model's
    block; by default the effort decides."""
    token_weights: bool
    """Weight each token by its influence on the model's output; off: all tokens count alike. Default:
    True."""
    temperature: Literal["kept", "dense"]
    """Softmax scale if repair finds no better one: 1/sqrt(kept width) (kept) or the dense one (dense).
    Default: 'kept'."""
    reweight: bool
    """Train a scale per kept channel, merged into the weights. Default: True."""
    gain_steps: int | None
    """Optimiser steps of the channel scales; by default 40, or none with repair."""
    gain_lr: float
    """Learning rate of the channel scales. Default: 0.003."""
    selection: Literal["repair", "indicator"]
    """Channels to keep once the widths are found: those that leave the smallest error after the repair
    (repair), or those with the best indicators (indicator). Default: 'repair'."""
    similarity: bool
    """Weight indicators by how little a channel resembles the other channels of its head. Default: True."""
    score_adjustment: bool
    """Keep the widths of all heads equal while indicators are trained; off: only in the final plan. Default:
    True."""
    init: Literal["attention-difference", "uniform"]
    """Initial values of the indicators. Default: 'attention-difference'."""
    steps: int
    """Optimiser steps of the indicators. Default: 60."""
    lr: float
    """Learning rate of the indicators. Default: 0.01."""
    budget_weight: float
    """Weight of the budget's gradient relative to the task's. Default: 1.0."""
    label_weight: float
    """Weight of the cross-entropy with labels relative to the distillation loss. Default: 0.1."""


class TimingKeywords(TypedDict, total=False):
    """Whether latency is measured, and where."""
    latency: bool
    """Measure latency before and after. Default: True."""
    latency_batch_size: int
    """Images per batch when latency is measured. Default: 8."""
    runtime: Literal["eager", "compile", "onnx", "openvino"]
    """Runtime to measure latency in: PyTorch without compilation, torch.compile, ONNX Runtime, or OpenVINO;
    the last two run on the CPU. Default: 'eager'."""
    int8: bool
    """Measure latency in INT8, before and after, with the dynamic quantization of ONNX Runtime. Default:
    False."""
    threads: int | None
    """CPU threads when latency is measured; by default torch's own choice."""


class PruneKeywords(
    TargetKeywords,
    CheckpointKeywords,
    DeviceKeywords,
    SearchKeywords,
    DataKeywords,
    TimingKeywords,
    PreprocessingKeywords,
    total=False,
):
    """Options of ``mhacut prune``."""
    output: str | os.PathLike[str] | None
    """File to write; by default named after the checkpoint and the budget, in the working directory."""
    scope: Literal["attention", "attention+mlp", "attention+mlp+tokens"]
    """Parts that may be pruned: channels of attention; also channels of MLPs; also tokens, which the blocks
    of a plain ViT then merge. Default: 'attention+mlp'."""
    preserve: str | None
    """Outputs to preserve: answers (the classifier's outputs), pooled (its inputs), tokens (the features of
    all tokens), pyramid (the feature maps of timm's features_only), or names of layers (blocks.10,blocks.11).
    By default answers, or tokens if there is no classifier."""
    keep_dead_tokens: bool
    """Compute all tokens in the last block, not only the one the classifier reads; for patch features.
    Default: False."""
    round_to: int | None
    """Round widths to multiples of N; by default 8, or 16 with a budget of time on a GPU."""
    overwrite: bool
    """Replace an existing file; the checkpoint is never replaced. Default: False."""
    dry_run: bool
    """Find the plan and show its results; write no model. Default: False."""
    report: str | os.PathLike[str] | None
    """Write an HTML report of the run; dry runs can have one too."""
    calibration_images: int | None
    """Number of images to calibrate on; by default the effort decides."""
    calibration: str | os.PathLike[str] | None
    """File that keeps the calibration: written if it is not there, otherwise read; one made under other
    conditions is refused."""
    labels: bool
    """Use labels if there are any; off: search by the dense model's outputs alone and measure no accuracy.
    Default: True."""
    eval_images: int
    """Validation images to measure accuracy on; 0 for none. Default: 2000."""
    amp: bool
    """Use bfloat16 autocast in the steps that train. Default: False."""
