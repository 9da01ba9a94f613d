"""FIPA (Chang, He, Hao 2026): the figures of the paper, run again."""
