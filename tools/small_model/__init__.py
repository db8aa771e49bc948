"""How the small model in `tests/data/small-model` was made and measured; needs PyTorch, which ggufkit itself does not.

    python -m tools.small_model.train --text web.txt wiki.txt --out tests/data/small-model
    python -m tools.small_model.evaluate --text web.txt wiki.txt --model tests/data/small-model

text.py      splits the texts, trains the SentencePiece tokenizer, encodes
network.py   the Llama, in PyTorch, with Hugging Face's tensor names
muon.py      the optimizer of its matrices
train.py     the training loop; writes the Hugging Face folder
ngram.py     the baseline: an interpolated modified Kneser-Ney model, in NumPy
evaluate.py  perplexities of both, on the same tokens
"""
