"""A lab of tiny networks: three depths at equal parameters, a second or two a run."""

LAB = """title = "Depth against width"
equal = "parameters"
compare = "3"
[recipe.model]
preset = "1M"
override = {hidden_size = 32, max_position_embeddings = 64}
[recipe.data]
sequence_length = 32
[recipe.train]
steps = 12
batch_tokens = 128
precision = "fp32"
checkpoint_every = 5
[recipe.optimizer]
learning_rate = 3e-3
warmup_steps = 2
[shape]
head_dim = 8
ffn_multiple = 4
ffn = "fit"
[axes]
num_hidden_layers = [2, 3, 6]
[published]
source = "a paper <b>"
column = "accuracy"
[published.values]
2 = 40.0
3 = 41.0
6 = 42.0
"""
