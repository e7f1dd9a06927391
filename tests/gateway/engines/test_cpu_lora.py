import numpy as np

from gateway.engines.cpu_lora import sparing_the_base


def test_tokens_of_no_adapter_get_no_update_and_the_others_theirs() -> None:
    weights = np.ones((2, 1, 3, 4))
    inputs = np.ones((3, 4))
    output = np.full((3, 3), 7.0)

    def as_vllm_does(
        inputs: np.ndarray, weights: np.ndarray, output: np.ndarray, indices: np.ndarray, scaling: float
    ) -> None:
        output[:] = scaling * np.einsum("bi,boi->bo", inputs, weights[indices][:, 0])  # -1 is the last slot

    sparing_the_base(as_vllm_does)(inputs, weights, output, np.array([0, -1, 1]), 0.5)
    assert output.tolist() == [[2.0] * 3, [0.0] * 3, [2.0] * 3]
