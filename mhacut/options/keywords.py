"""Keyword arguments of mhacut's functions; written by ``python -m mhacut.options.generate``."""

# fmt: off
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class ModelKeywords(TypedDict, total=False):
    """Architecture of checkpoints that do not state theirs, and what in them is the model."""
    model: str | None
    """timm architecture, for a file that does not state it."""
    model_args: Mapping[str, Any]
    """Arguments of that architecture, such as img_size=32 depth=6. Default: {}."""
    part: str | None
    """Part of a training checkpoint that is the model: state_dict, student, backbone, ..."""


class DeviceKeywords(TypedDict, total=False):
    """Device that computes."""
    device: str
    """auto, cpu, cuda or cuda:N. Default: 'auto'."""


class BenchKeywords(ModelKeywords, DeviceKeywords, total=False):
    """Options of ``mhacut bench``."""
    runtime: Literal["eager", "compile", "onnx", "openvino"]
    """PyTorch without compilation, torch.compile, ONNX Runtime, or OpenVINO. Default: 'eager'."""
    int8: bool
    """Time each checkpoint in INT8 too, as ONNX Runtime quantizes it dynamically. Default: False."""
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
    """Refuse a model with another number of classes."""


class ImageSourceKeywords(TypedDict, total=False):
    """Source of images."""
    data_dir: str | os.PathLike[str] | None
    """Folder with train/ and val/, or of unlabelled images."""
    dataset: str | None
    """Dataset by its name in timm: hfds/NAME, wds/NAME, tfds/NAME, torch/NAME."""


class LabelledImagesKeywords(ImageSourceKeywords, total=False):
    """Source of images to measure accuracy on."""
    class_map: str | os.PathLike[str] | None
    """Text file with the class names in the order of the model's head."""
    val_split: str
    """Split to measure accuracy on. Default: 'val'."""
    workers: int
    """Processes that load images. Default: 2."""


class PreprocessingKeywords(TypedDict, total=False):
    """Overrides of the checkpoint's own preprocessing; None keeps that."""
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
    """Images for INT8; without any, activations are quantized dynamically and noise is compared on."""
    train_split: str
    """Split to take images from. Default: 'train'."""
    calibration_images: int
    """Images to find the ranges of activations on; a quarter is held out to compare on. Default: 256."""


class ExportKeywords(CheckpointKeywords, QuantizationImagesKeywords, total=False):
    """Options of ``mhacut export``."""
    format: Literal["onnx", "pt2", "openvino", "timm"]
    """ONNX for ONNX Runtime and others, pt2 for torch.export.load, OpenVINO IR (.xml and .bin), or a folder
    for timm and the hub. Default: 'onnx'."""
    output: str | os.PathLike[str] | None
    """File or folder to write; by default the checkpoint's stem and the format's ending, in the working
    directory."""
    overwrite: bool
    """Replace an existing file; the checkpoint is never replaced. Default: False."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Precision of the weights; images and logits are always float32. Default: 'float32'."""
    fixed_batch: int | None
    """Images per batch; by default any number."""
    license: str | None
    """License to state in the model card, by its name on the hub (apache-2.0, mit, ...); by default the one
    that the file of the weights states, if it states one."""
    push_to_hub: str | None
    """Push the folder to this repository of the Hugging Face hub, which is created if there is none."""
    private: bool
    """Create the repository as a private one. Default: False."""
    opset: int
    """ONNX opset; 23 and later have an attention operator. Default: 18."""
    int8: bool
    """Quantize the weights of linear layers to INT8, and compare speed, size and answers with float32.
    Default: False."""
    quantization: Literal["auto", "dynamic", "static"]
    """Activations are quantized by their range in each image (dynamic) or by one found on images (static,
    which needs images; other runtimes want it). With images, auto takes the one that is closer to float32.
    Default: 'auto'."""
    reduce_range: bool
    """Weights of 7 bits: x86 CPUs without VNNI overflow with 8. Default: False."""
    threads: int | None
    """CPU threads to time INT8 with; by default torch's own choice."""


class TeacherKeywords(TypedDict, total=False):
    """Teacher that the model learns from besides labels."""
    teacher: str | os.PathLike[str] | None
    """Checkpoint of the dense model, or of any with the same classes, to learn from; labels are then
    optional."""
    teacher_model: str | None
    """timm architecture of a teacher file that does not state it; by default that of the dense model."""
    teacher_model_args: Mapping[str, Any]
    """Arguments of that architecture. Default: {}."""
    teacher_part: str | None
    """Part of a training checkpoint that is the teacher: state_dict, student, backbone, ..."""
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
    """Weight decay; not applied to biases, norms and what the model exempts. Default: 0.05."""
    sched: Literal["cosine", "poly", "step", "tanh", "constant"]
    """Learning rate schedule. Default: 'cosine'."""
    warmup_epochs: float
    """Epochs in which the learning rate rises. Default: 0.0."""
    clip_grad: float | None
    """Largest norm of the gradient; 0 for no limit. Default: 1.0."""
    model_ema: bool
    """Measure and write a moving average of the weights. Default: False."""
    seed: int
    """Random seed. Default: 42."""
    momentum: float
    """Momentum, of optimisers that have it. Default: 0.9."""
    layer_decay: float | None
    """Factor on the learning rate from each layer to the one before."""
    drop_path: float
    """Stochastic depth of the last block; earlier ones have less. Default: 0.0."""
    warmup_lr: float
    """Learning rate at the start of the warmup. Default: 1e-06."""
    min_lr: float
    """Learning rate at the end. Default: 1e-06."""
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
    """Vary training images; off, they are prepared as for validation, and only mixup and cutmix act. Default:
    True."""
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
    """Probability of a horizontal flip; 0 where left and right differ. Default: 0.5."""
    vflip: float
    """Probability of a vertical flip. Default: 0.0."""
    color_jitter: float
    """Strength of changes of brightness, contrast and saturation; unused with an AutoAugment policy. Default:
    0.0."""
    reprob: float
    """Probability of erasing a rectangle. Default: 0.0."""
    remode: Literal["const", "rand", "pixel"]
    """Filling of an erased rectangle. Default: 'pixel'."""
    recount: int
    """Largest number of erased rectangles per image. Default: 1."""
    mixup_prob: float
    """Probability that the images of a step are mixed, with mixup or cutmix. Default: 1.0."""
    mixup_switch_prob: float
    """Probability of cutmix rather than mixup, with both. Default: 0.5."""
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
    """Directory of the run; by default the file's stem and -finetuned, in the working directory."""
    overwrite: bool
    """Start anew in a directory that holds a run; the slim file is never replaced. Default: False."""
    resume: str | os.PathLike[str] | None
    """Go on with the run in a directory, with its own options."""
    save_every: int
    """Steps between saves within an epoch; 0 saves only at its end. Default: 0."""
    labels: bool
    """Learn from labels where there are any; off, from the teacher alone. Accuracy is measured all the same.
    Default: True."""
    eval_images: int | None
    """Validation images to measure accuracy on; all by default, 0 for none."""
    amp: bool
    """Mixed precision. Default: False."""
    compile: bool
    """Compile the model with torch.compile. Default: False."""
    log: str | None
    """Log to png, tensorboard or wandb, or several with commas between, besides summary.csv."""
    dtype: Literal["float32", "bfloat16", "float16"] | None
    """Precision of the weights that are written; by default the slim file's."""
    amp_dtype: Literal["bfloat16", "float16"]
    """Type of mixed precision; float16 needs CUDA. Default: 'bfloat16'."""
    grad_checkpointing: bool
    """Compute activations twice to keep fewer in memory. Default: False."""
    channels_last: bool
    """Lay images out with channels last, for convolutions. Default: False."""
    deterministic: bool
    """Refuse CUDA kernels that sum in random order; CPUs always repeat. Default: False."""


class InspectKeywords(
    CheckpointKeywords,
    ImageSourceKeywords,
    DeviceKeywords,
    PreprocessingKeywords,
    total=False,
):
    """Options of ``mhacut inspect``."""
    layer: str | None
    """Show only layers whose name matches, head by head: 'blocks.1*.attn'."""
    heads: bool
    """Show every head, and the channels it keeps or would keep at 75, 50, 25 %. Default: False."""
    sort: Literal["layer", "flops", "params", "qk", "v", "similarity", "rank"]
    """Order of the layers; all but the first put the largest on top. Default: 'layer'."""
    shapes: bool
    """Show widths and costs from the file's header alone; reads no weights. Default: False."""
    html: str | os.PathLike[str] | None
    """Write the report as one HTML page that needs no network."""
    png: str | os.PathLike[str] | None
    """Draw the report's charts; needs pip install 'mhacut[plot]'."""
    overwrite: bool
    """Replace existing files. Default: False."""
    compare: str | os.PathLike[str] | None
    """Compare layer by layer with the dense model this one was made from; without images, on synthetic
    ones."""
    train_split: str
    """Split to take images from. Default: 'train'."""
    calibration_images: int | None
    """Number of images to judge heads by; 64 by default."""
    seed: int
    """Random seed of the choice of images. Default: 42."""
    batch_size: int
    """Images per batch. Default: 16."""


class TargetKeywords(TypedDict, total=False):
    """Budgets, all of which are met, or bounds on the loss, within which the smallest model is found."""
    params: str | None
    """Budget of parameters: 2.8M or 50%. Budgets of several kinds are all met."""
    size: str | None
    """Budget of the written file: 6MB, 5.5MiB or 50%, in the dtype of the checkpoint."""
    max_latency: str | None
    """Budget of time per batch: 12ms, or 50% of the dense model's, as latency is measured. The file is timed
    beside the dense model."""
    max_kl: float | None
    """Find the smallest model whose answers have at most this KL divergence, in nats, from the dense model's,
    on the held-out calibration images."""
    max_drop: float | None
    """Find the smallest model that loses at most so many points of top-1 accuracy on the labelled validation
    images."""
    exclude: tuple[str, ...]
    """Leave layers or units whole whose names match: 'blocks.0.*', '*.attn.qk'. Can be repeated. Default:
    ()."""
    min_width: tuple[str, ...]
    """Keep at least so many channels per head, or of an MLP, where names match: 'blocks.*.mlp=256'. Can be
    repeated. Default: ()."""
    equal_qkv: bool
    """Keep q/k and v of each layer equally wide, for fused attention of TensorRT and ONNX Runtime. Default:
    False."""


class SearchKeywords(TypedDict, total=False):
    """Search for the plan; every ingredient can be switched off for ablation."""
    effort: Literal["fast", "balanced", "best"]
    """Amount of work: fast takes seconds, balanced a minute or two, best as long as it takes. Default:
    'balanced'."""
    batch_size: int
    """Images per batch. Default: 16."""
    seed: int
    """Random seed. Default: 42."""
    allocation: Literal["curves", "indicator", "refined", "uniform"]
    """Division of the budget among layers: by sensitivity curves, by trained indicators (the paper's way), by
    indicators that start from the curves' plan, where they do better on held-out images, or uniformly.
    Default: 'curves'."""
    basis: Literal["auto", "channel", "principal"]
    """Channels to choose from: the model's own, principal components where that is exact, or, per layer,
    whichever leave the smaller error on held-out images. Default: 'auto'."""
    positions: Literal["auto", "own", "equal"]
    """Which v channels are kept by heads that share the filters of a convolution: each head its own, with a
    copy of the filters, the same positions in all heads, or, per layer, whichever leaves the smaller error on
    held-out images. Default: 'auto'."""
    repair: bool
    """Refit by least squares the weights that read the output of a pruned layer. Default: True."""
    swap_moves: bool | None
    """Exchange kept v and hidden channels for others while that lowers the error after the repair; by default
    the effort decides."""
    repair_in_order: bool | None
    """Refit once more, layer by layer, on the outputs of the layers pruned before; by default the effort
    decides, where nothing is healed."""
    heal_steps: int | None
    """Steps that train each block of the pruned model, in order, to give the output of the dense model's; by
    default the effort decides."""
    tuning_steps: int | None
    """Steps that train all weights of the pruned model to match the dense one on the calibration images; by
    default none."""
    tuning_lr: float
    """Learning rate of the tuning steps. Default: 3e-05."""
    token_weights: bool
    """Weight each token by its influence on the model's output; off, all count alike. Default: True."""
    temperature: Literal["kept", "dense"]
    """Softmax scale of a pruned layer where the repair fits none better: 1/sqrt(kept width), or the dense
    model's. Default: 'kept'."""
    reweight: bool
    """Train a scale per kept channel, merged into the weights. Default: True."""
    gain_steps: int | None
    """Optimiser steps of the channel scales; by default 40 without repair, none with it."""
    gain_lr: float
    """Learning rate of the channel scales. Default: 0.003."""
    selection: Literal["repair", "indicator"]
    """Channels that fill the widths found: those that serve best after the repair, or those with the best
    indicators. Default: 'repair'."""
    similarity: bool
    """Weight indicators by how little a channel resembles the others of its head. Default: True."""
    score_adjustment: bool
    """Keep the widths of all heads equal while indicators are trained; off, only in the final plan. Default:
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
    """Where latency is measured: PyTorch without compilation, torch.compile, ONNX Runtime, or OpenVINO; the
    last two on the CPU. Default: 'eager'."""
    int8: bool
    """Measure latency in INT8, before and after, as ONNX Runtime quantizes dynamically. Default: False."""
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
    """File to write; by default the checkpoint's stem and the budget, in the working directory."""
    scope: Literal["attention", "attention+mlp", "attention+mlp+tokens"]
    """Parts that may be pruned: channels of attention, of MLPs too, and tokens, which blocks of a plain ViT
    then merge. Default: 'attention+mlp'."""
    preserve: str | None
    """Outputs to preserve: answers, pooled (what the classifier reads), tokens (the features of all), pyramid
    (those of timm's features_only), or names of layers (blocks.10,blocks.11). By default answers, without a
    classifier tokens."""
    keep_dead_tokens: bool
    """Compute all tokens in the last block, though the classifier reads the first only: for models whose
    patch features are used. Default: False."""
    round_to: int | None
    """Round widths to multiples of N; by default 8, and 16 for a budget of time on a GPU."""
    overwrite: bool
    """Replace an existing file; the checkpoint is never replaced. Default: False."""
    dry_run: bool
    """Find the plan and show what it gives; write no model. Default: False."""
    report: str | os.PathLike[str] | None
    """Write an HTML page about the run, a dry run included."""
    calibration_images: int | None
    """Number of images to calibrate on; by default the effort decides."""
    calibration: str | os.PathLike[str] | None
    """File that keeps the calibration: taken from it if it is there and fits, else gathered and kept."""
    labels: bool
    """Use labels where there are any; off, search by the dense model's outputs alone and measure no accuracy.
    Default: True."""
    eval_images: int
    """Validation images to measure accuracy on; 0 for none. Default: 2000."""
    amp: bool
    """Train under bfloat16 autocast, where anything is trained. Default: False."""
