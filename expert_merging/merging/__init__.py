"""Merging fine-tuned models of one pre-trained ancestor, a module a method; `registry` has a row for each.

Every method has the same call, `method(base, models, **settings)`: `base` and `models` map names to tensors (a state dict,
or `SafetensorsFolder`, which reads from disk), and what comes back yields (name, tensor) one after another, so
that no more than a few tensors are in memory. Nothing that is given is changed. Arithmetic is at least in float32 and
results have the dtype of `base`; tensors that are not of floating point are those of `base`; tied tensors count once.
`dict(method(...))` is a state dict, `write_tensors(method(...), folder)` a file.
"""
