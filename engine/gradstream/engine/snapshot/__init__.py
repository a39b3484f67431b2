"""Snapshots of training state: consistent cuts through all models of an engine, from which a successor of the gang goes on.

Below the store's directory:

    models/{model}/{epoch}-{number}/shard-00001-model-00001-of-00001.safetensors
    cuts/{epoch}-{number}.json

A cut is taken between two batches and named after the last one that it holds, (epoch, number). Its file is the only entry point: it
names, for each live model, a directory with every file's size and SHA-256, and carries a digest of itself. Directories are immutable.
A cut writes the models that changed since the one before and refers to that one's directories for the others. All of it appears by
rename after fsync, the directories before the cut that names them, so what is cut short is never read. Nothing is pickled.

One safetensors file a rank, `shard-{rank + 1}`, holds that rank's parts of the tensors, with the place of each part in the whole
(`saved_offsets`) in the file's header. This is the sharded layout of torch.distributed.checkpoint, whose HuggingFaceStorageReader
loads it into any sharding; the cut names each tensor's whole shape, and `shards.read_shards` puts it together from any number of
files. The files are written here and not by DCP's writer, which plans through collectives, and without a process group marks no rank
but the first.

A model is the same on every rank, so it has one shard: flat `weights`, the tensors of its optimizer's state and, while something is
accumulated, flat fp32 `grad`, in the order of its layout; of an adapter that was merged, flat fp32 `frozen` too, the frozen factors. An
adapter is of kind "lora", the base model's own weights of kind "full". The format leaves room for models of which each rank holds a
part.

There is no random state to keep: an adapter's first values follow from the seed in its spec, and every draw of a sample is a hash of
its job, its place and its seed. Samplers' frozen adapters are checkpoints of their own on disk; a sample that was running is run
again.
"""
