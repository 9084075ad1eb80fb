"""BibTeX of the papers behind each solver."""

_CHEN = """@article{chen2016training,
  title = {Training Deep Nets with Sublinear Memory Cost},
  author = {Chen, Tianqi and Xu, Bing and Zhang, Chiyuan and Guestrin, Carlos},
  journal = {arXiv preprint arXiv:1604.06174},
  year = {2016}
}"""
_REVOLVE = """@article{griewank2000algorithm,
  title = {Algorithm 799: Revolve: An Implementation of Checkpointing for the Reverse or Adjoint Mode of Computational
           Differentiation},
  author = {Griewank, Andreas and Walther, Andrea},
  journal = {ACM Transactions on Mathematical Software},
  volume = {26},
  number = {1},
  pages = {19--45},
  year = {2000}
}"""
_MULTISTAGE = """@article{stumm2009multistage,
  title = {MultiStage Approaches for Optimal Offline Checkpointing},
  author = {Stumm, Philipp and Walther, Andrea},
  journal = {SIAM Journal on Scientific Computing},
  volume = {31},
  number = {3},
  pages = {1946--1967},
  year = {2009}
}"""
_ONLINE = """@article{stumm2010new,
  title = {New Algorithms for Optimal Online Checkpointing},
  author = {Stumm, Philipp and Walther, Andrea},
  journal = {SIAM Journal on Scientific Computing},
  volume = {32},
  number = {2},
  pages = {836--854},
  year = {2010}
}"""
_ROTOR = """@techreport{beaumont2019optimal,
  title = {Optimal Checkpointing for Heterogeneous Chains: How to Train Deep Neural Networks with Limited Memory},
  author = {Beaumont, Olivier and Eyraud-Dubois, Lionel and Hermann, Julien and Joly, Alexis and Shilova, Alena},
  institution = {Inria},
  number = {RR-9302},
  year = {2019}
}"""
_ROCKMATE = """@inproceedings{zhao2023rockmate,
  title = {Rockmate: an Efficient, Fast, Automatic and Generic Tool for Re-materialization in PyTorch},
  author = {Zhao, Xunyi and Le Hellard, Th{\\'e}otime and Eyraud-Dubois, Lionel and Gusak, Julia and Beaumont, Olivier},
  booktitle = {International Conference on Machine Learning},
  year = {2023}
}"""
_KUSUMOTO = """@inproceedings{kusumoto2019graph,
  title = {A Graph Theoretic Framework of Recomputation Algorithms for Memory-Efficient Backpropagation},
  author = {Kusumoto, Mitsuru and Inoue, Takuya and Watanabe, Gentaro and Akiba, Takuya and Koyama, Masanori},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {32},
  year = {2019}
}"""
_CHECKMATE = """@inproceedings{jain2020checkmate,
  title = {Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization},
  author = {Jain, Paras and Jain, Ajay and Nrusimha, Aniruddha and Gholami, Amir and Abbeel, Pieter and
            Gonzalez, Joseph and Keutzer, Kurt and Stoica, Ion},
  booktitle = {Proceedings of Machine Learning and Systems},
  volume = {2},
  pages = {497--511},
  year = {2020}
}"""

CITATIONS: dict[str, str] = {
    "chain": f"{_ROTOR}\n\n{_ROCKMATE}",
    "checkmate": _CHECKMATE,
    "chen": _CHEN,
    "chen and revolve": f"{_CHEN}\n\n{_REVOLVE}",
    "lower_sets": _KUSUMOTO,
    "lower_sets (approximate)": _KUSUMOTO,
    "lower_sets (exact)": _KUSUMOTO,
    "multistage": _MULTISTAGE,
    "online": _ONLINE,
    "regions_milp": f"{_CHECKMATE}\n\n{_ROTOR}",
    "revolve": _REVOLVE,
}


def cite(solver: str) -> str:
    """Return the BibTeX of a solver by the name its solutions carry; empty for one without a paper."""
    return CITATIONS.get(solver, "")
