"""What training and sampling cost on this machine, and with which options: `python -m tools.speed`.

On two cores of a CPU it takes about three minutes, most of them for compiling. It can be run in parts:

    python -m tools.speed --rows digits inception
    python -m tools.speed --rows DiT-S/4 --compile false --precision float32 bfloat16

A step is all that training does: gradients, optimizer, forced normalization, averages. The ways to take it, and the
matrix products of its linear layers alone, take turns until --seconds have passed. The table has the medians of
milliseconds, with the least in brackets, images a second, and which share of the time the products alone would take.
Memory is what a training holds: weights, Adam's moments, two averages, and whichever is more of gradients and of what
the forward pass keeps for them; on CUDA it is the measured peak. There the table also has the FLOP/s of the network
and their share of those of a bfloat16 product of two 8192x8192 matrices, and batches fill half of its memory or more.
"""

import time
from contextlib import nullcontext
from functools import partial
from itertools import product
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fid import inception
from layers import MPLinear
from model import DiTConfig, edm2_loss
from plumbing.command import Parser, between, run_main
from plumbing.processes import check_compiler, choose_device, has_bfloat16, provenance
from train import TrainConfig, build, optimizer_step

LATENTS = {"image_size": 32, "channels": 4}
NETWORKS = {"digits": {"image_size": 8, "channels": 1, "patch": 2},
            "28x28": {"image_size": 28, "channels": 1, "patch": 4, "depth": 8, "width": 256, "heads": 8},
            "DiT-S/4": {**LATENTS, "size": "S", "patch": 4},
            "DiT-B/2": {**LATENTS, "size": "B", "patch": 2},
            "DiT-XL/2": {**LATENTS, "size": "XL", "patch": 2}}
BATCHES = {"digits": 64, "28x28": 32, "DiT-S/4": 8, "DiT-B/2": 4, "DiT-XL/2": 1}  # but on CUDA
SMALL, LARGE = ["digits", "28x28", "DiT-S/4", "inception"], ["DiT-B/2", "DiT-XL/2", "inception"]
CALLS = 63  # of the network for an image, in the 32 Heun steps of sample.py


class Training:
    """The training of one network on random images, with a step for each way to take it."""

    def __init__(self, family, options, device):
        config = TrainConfig(model=DiTConfig(block=family, num_classes=10, **options))
        self.denoiser, self.ema, self.optimizer = build(config, device)
        self.device = device
        self.shape = (config.model.channels, config.model.image_size, config.model.image_size)

    def loss(self, batch, bfloat16):
        self.denoiser.in_bfloat16 = bfloat16
        images = torch.randn(batch, *self.shape, device=self.device)
        sigma = torch.ones(batch, device=self.device)
        return edm2_loss(self.denoiser, self.denoiser.uncertainty(sigma), images, sigma.long(), sigma, images)

    def step(self, batch, compiled, bfloat16):
        """Take one step, which leaves no gradients behind."""
        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            self.loss(batch, bfloat16).backward()
        optimizer_step(self.denoiser, self.optimizer, 1e-3)
        self.ema.update(self.denoiser, self.ema.step + 1)
        self.denoiser.zero_grad()

    @torch.no_grad()
    def call(self, batch, bfloat16):
        """Call the network once, as sampling does."""
        self.denoiser.in_bfloat16 = bfloat16
        with torch.compiler.set_stance("force_eager"):
            self.denoiser(torch.randn(batch, *self.shape, device=self.device), 1.0)

    def products(self, batch, bfloat16):
        """A function that computes only the matrix products of a step's linear layers, forward and backward."""
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        inputs, pairs = {}, []

        def note(layer, args, output):
            shape = args[0].flatten(0, -2).shape  # (rows, fan_in)
            if shape not in inputs:
                inputs[shape] = torch.randn(shape, dtype=dtype, device=self.device)
            pairs.append((inputs[shape], layer.weight.detach().to(dtype)))

        linears = [part for part in self.denoiser.net.modules() if isinstance(part, (MPLinear, torch.nn.Linear))]
        hooks = [linear.register_forward_hook(note) for linear in linears]
        self.call(batch, bfloat16)
        for hook in hooks:
            hook.remove()

        def compute():
            for x, w in pairs:
                y = x @ w.T
                y @ w
                y.T @ x

        return compute

    def held(self):
        """Bytes of weights, buffers, Adam's moments and averages; they are complete after the first step."""
        modules = [self.denoiser, *self.ema.averages.values()]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        tensors += [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def kept(self, batch, compiled, bfloat16):
        """Bytes that the forward pass keeps for the gradients, the weights left out."""
        weights = {p.untyped_storage().data_ptr() for p in self.denoiser.parameters()}
        kept = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = self.loss(batch, bfloat16)  # while this lives no storage can take another's place
        del loss
        return sum(kept.values())

    def memory(self, batch, compiled, bfloat16):
        """Bytes that training holds at most; on CUDA measured, else estimated, see above."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(batch, compiled, bfloat16)
            return self.held() + torch.cuda.max_memory_allocated() - before
        gradients = sum(p.nbytes for p in self.denoiser.parameters())
        return self.held() + max(gradients, self.kept(batch, compiled, bfloat16))

    def flops(self):
        """Floating-point operations for an image in a step: those of all matrix products, forward and backward, of
        attention written out, since the fused one computes some of its own twice."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            with torch.compiler.set_stance("force_eager"):
                self.loss(1, False).backward()
        self.denoiser.zero_grad()
        return counter.get_total_flops()


def wait_for(device):
    """Until all is computed: calls of a GPU's functions return before."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def measure(functions, seconds, device):
    """Seconds that each function takes, {name: (median, least)}. They take turns, after a first call of each, until
    `seconds` have passed, but three times at least."""
    for function in functions.values():
        function()
    wait_for(device)
    times, end = {name: [] for name in functions}, time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            wait_for(device)
            times[name].append(time.perf_counter() - begin)
    return {name: (median(values), min(values)) for name, values in times.items()}


def largest_batch(trainings):
    """The power of two with which eager steps in float32 fill between 40% and 80% of the GPU's memory, at most 1024.
    Why not more: the matrix products that are timed between steps have tensors of their own."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    batch = 1
    while batch < 1024:
        for training in trainings:
            training.step(batch, False, False)
        if torch.cuda.max_memory_allocated() > 0.4 * total:
            break
        batch *= 2
    return batch


def measure_network(name, args, device, peak):
    """Print the rows of a network. Returns its line about sampling, and the options of the fastest way to train the
    first family, simpler ones if they are at most 5% slower."""
    torch.compiler.reset()  # it compiles one code eight times at most
    trainings = {family: Training(family, NETWORKS[name], device) for family in args.families}
    batch = args.batch or BATCHES[name]
    if device.type == "cuda" and not args.batch:
        batch = largest_batch(trainings.values())
    ways = list(product(args.compile, args.precision))
    functions = {}
    for family, training in trainings.items():
        training.denoiser.net.compile()
        for precision in args.precision:
            bfloat16 = precision == "bfloat16"
            functions[family, "products", precision] = training.products(batch, bfloat16)
            functions[family, "call", precision] = partial(training.call, batch, bfloat16)
        for compiled, precision in ways:
            step = partial(training.step, batch, compiled == "true", precision == "bfloat16")
            functions[family, compiled, precision] = step
    times = measure(functions, args.seconds, device)

    for family, (compiled, precision) in product(args.families, ways):
        middle, least = times[family, compiled, precision]
        share = times[family, "products", precision][1] / least
        memory = trainings[family].memory(batch, compiled == "true", precision == "bfloat16")
        row = [f"{name}, batch {batch}", family, compiled, precision, f"{1000 * middle:.1f} ({1000 * least:.1f})",
               f"{batch / middle:.1f}", f"{share:.0%}", f"{memory / 2**30:.2f} GiB"]
        if peak:
            rate = batch * trainings[family].flops() / middle
            row += [f"{rate / 1e12:.0f}", f"{rate / peak:.0%}"]
        print(f"| {' | '.join(row)} |", flush=True)
    if args.profile:
        print_profile(trainings[args.families[0]], batch, *ways[-1], device)

    family = args.families[0]
    speeds = [f"{batch / (CALLS * times[family, 'call', precision][0]):.3g} in {precision}"
              for precision in args.precision]
    limit = 1.05 * min(times[family, *way][0] for way in ways)
    compiled, precision = next(way for way in ways if times[family, *way][0] <= limit)
    sampling = f"images/s of sampling, {name}, {family}, {CALLS} calls each, eager: {', '.join(speeds)}"
    return sampling, f"{name} --compile={compiled} --precision={precision}"


def print_profile(training, batch, compiled, precision, device):
    """Print where the time of one step goes, by kernel."""
    kinds = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}
    with profile(activities=[kinds[device.type]]) as profiled:
        training.step(batch, compiled == "true", precision == "bfloat16")
        wait_for(device)
    order = f"self_{device.type}_time_total"
    print(profiled.key_averages().table(order, row_limit=20, max_name_column_width=60))


def inception_shapes():
    """Shapes of the kernels of fid.inception(), by name: (fan_out, fan_in, height, width). Why: to time it takes
    weights, and any will do."""
    shapes = {}

    def chain(name, fan_in, *layers):
        for suffix, fan_out, height, width in layers:
            shapes[name + suffix] = (fan_out, fan_in, height, width)
            fan_in = fan_out

    chain("Conv2d_", 3, ("1a_3x3", 32, 3, 3), ("2a_3x3", 32, 3, 3), ("2b_3x3", 64, 3, 3), ("3b_1x1", 80, 1, 1),
          ("4a_3x3", 192, 3, 3))
    for block, D, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        chain(f"{block}.branch", D, ("1x1", 64, 1, 1))
        chain(f"{block}.branch5x5", D, ("_1", 48, 1, 1), ("_2", 64, 5, 5))
        chain(f"{block}.branch3x3dbl", D, ("_1", 64, 1, 1), ("_2", 96, 3, 3), ("_3", 96, 3, 3))
        chain(f"{block}.branch_pool", D, ("", pool, 1, 1))
    chain("Mixed_6a.branch3x3", 288, ("", 384, 3, 3))
    chain("Mixed_6a.branch3x3dbl", 288, ("_1", 64, 1, 1), ("_2", 96, 3, 3), ("_3", 96, 3, 3))
    for block, C in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        chain(f"{block}.branch1x1", 768, ("", 192, 1, 1))
        chain(f"{block}.branch7x7", 768, ("_1", C, 1, 1), ("_2", C, 1, 7), ("_3", 192, 7, 1))
        chain(f"{block}.branch7x7dbl", 768, ("_1", C, 1, 1), ("_2", C, 7, 1), ("_3", C, 1, 7), ("_4", C, 7, 1),
              ("_5", 192, 1, 7))
        chain(f"{block}.branch_pool", 768, ("", 192, 1, 1))
    chain("Mixed_7a.branch3x3", 768, ("_1", 192, 1, 1), ("_2", 320, 3, 3))
    chain("Mixed_7a.branch7x7x3", 768, ("_1", 192, 1, 1), ("_2", 192, 1, 7), ("_3", 192, 7, 1), ("_4", 192, 3, 3))
    for block, D in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        chain(f"{block}.branch1x1", D, ("", 320, 1, 1))
        chain(f"{block}.branch3x3", D, ("_1", 384, 1, 1), ("_2a", 384, 1, 3))
        chain(f"{block}.branch3x3", 384, ("_2b", 384, 3, 1))
        chain(f"{block}.branch3x3dbl", D, ("_1", 448, 1, 1), ("_2", 384, 3, 3), ("_3a", 384, 1, 3))
        chain(f"{block}.branch3x3dbl", 384, ("_3b", 384, 3, 1))
        chain(f"{block}.branch_pool", D, ("", 192, 1, 1))
    return shapes


@torch.no_grad()
def measure_inception(args, device):
    """Print how many images a second the features of the FID take."""
    batch = args.batch or (64 if device.type == "cuda" else 4)
    weights = {}
    for name, shape in inception_shapes().items():
        kernel = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
        weights[name] = kernel, torch.zeros(shape[0], device=device)
    images = torch.zeros(batch, 3, 32, 32, device=device)
    middle, _ = measure({"inception": lambda: inception(images, weights)}, args.seconds / 3, device)["inception"]
    print(f"images/s of Inception, float32: {batch / middle:.3g}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--rows", nargs="+", choices=[*NETWORKS, "inception"], metavar="ROW",
        help=f"what to measure: {', '.join(NETWORKS)}, inception (default: the first three and inception, on CUDA "
             "the last three)")
    add("--families", nargs="+", choices=("mp", "plain"), default=["mp", "plain"], help="mp, plain (default: both)")
    add("--compile", nargs="+", choices=("false", "true"), default=["false", "true"],
        help="false, true (default: both)")
    add("--precision", nargs="+", choices=("float32", "bfloat16"),
        help="float32, bfloat16 (default: those that the processor has)")
    add("--batch", type=between(int, 1, 10**5), help="images a step (default: chosen for each network)")
    add("--seconds", type=between(float, 0, 3600), default=10, help="to measure each row of networks (default: 10)")
    add("--threads", type=between(int, 1, 256), help="of a CPU (default: as torch chooses)")
    add("--profile", action="store_true", help="also print where the time of the last way of each network goes")
    add("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if "true" in args.compile:
        check_compiler(device)
    args.precision = args.precision or ["float32", "bfloat16"][:1 + has_bfloat16(device)]
    args.rows = args.rows or (LARGE if device.type == "cuda" else SMALL)

    print(f"{provenance(device)['hardware']}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"bfloat16 {'in hardware' if has_bfloat16(device) else 'emulated'}\n")
    columns = ["network", "family", "compile", "precision", "ms a step (least)", "images/s", "of products", "memory"]
    peak = None
    if device.type == "cuda":
        columns += ["TFLOP/s", "of peak"]
        x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        peak = 2 * 8192**3 / measure({"product": lambda: x @ x}, 1, device)["product"][0]
        print(f"a bfloat16 product of 8192³: {peak / 1e12:.0f} TFLOP/s\n")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    results = [measure_network(name, args, device, peak) for name in args.rows if name != "inception"]
    print()
    for sampling, _ in results:
        print(sampling)
    if "inception" in args.rows:
        measure_inception(args, device)
    print(f"options to use here: {'; '.join(options for _, options in results)}")


if __name__ == "__main__":
    run_main(main)
