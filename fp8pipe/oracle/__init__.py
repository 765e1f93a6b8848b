"""What transformers and vLLM make of a checkpoint: each builds its own model on the meta device, in a child process.

transformers        asks for the role of every tensor; `transformers_probe` answers
vllm                asks where vLLM's loader puts every tensor; `vllm_probe` answers
vllm_roles          asks vLLM for the roles where transformers lacks the model; `vllm_roles_probe` answers
vllm_registry       says whether vLLM has a class for a model at all, without a child process
configs             asks both what differs between two config.json; `configs_probe` answers
limits              errors that tell of the way of asking, not of the checkpoint
asked               notes the names that vLLM looks for in an ignore list
stand_ins           kernels and torchvision, which vLLM only needs to be there
bounds              how much a config may make a library build, by what lies on disk
landing             follows tensors through a loader without data
compressed_tensors  that library's own opinion of a quantization_config
cache               where answers are kept
basis               what answers depend on besides the models
lean                imports a library without its optional packages
"""
