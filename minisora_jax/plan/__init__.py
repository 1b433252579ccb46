"""What a run would need on a pod: compiled for it where the pod is of TPUs, reckoned where it is of GPUs."""
