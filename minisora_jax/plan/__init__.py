"""Plans of a run on a pod. Steps are compiled for TPU pods; for GPUs their cost is modelled from shapes."""
