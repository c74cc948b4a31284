"""What makes an allocation policy better: PPO, its adaptation to one image, and their judge.

Decoding and encoding load none of it; `--adapt` and the training workflows do.
May import the modules of `pcdc`, which import nothing from here.
"""
