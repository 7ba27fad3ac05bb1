# %% [markdown]
# # Predictions beside measurements
#
# Four kinds of evidence, from the calls that `moesim validate` makes: end-to-end points, kernels, published throughput, two runs request by request.
# Misses are in every figure. `QUICK = True` looks at few rows of each; the whole takes some minutes.

# %%
import matplotlib.pyplot as plt

from moesim.api.published.validate import validate_published
from moesim.api.validation import read_run, shipped_runs, validate_run
from moesim.api.validation_kernels import validate_kernels
from moesim.api.validation_points import validate_points

QUICK = False

# %% [markdown]
# ## End-to-end points
#
# Every point is a measured closed loop that was simulated as such. On the dashed line prediction and measurement agree; dotted lines are 20 % off.

# %%
points = validate_points(hardware="h100-sxm-8", wanted=(lambda row: row.clients == 4 and row.output <= 1024) if QUICK else (lambda row: True))
labels = sorted(points["groups"])
figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
for axis, quantity in zip(axes, ("tpot", "ttft"), strict=True):
    both = []
    for number, label in enumerate(labels):
        rows = [row for row in points["rows"] if f"{row['model']} {row['backend']}" == label and row["errors"][quantity] is not None]
        measured = [row["measured_ms"][quantity] for row in rows]
        predicted = [row["predicted_ms"][quantity] for row in rows]
        axis.loglog(measured, predicted, "o^sDv"[number % 5], ms=4, alpha=0.6, color=f"C{number % 10}", label=label)
        both += measured + predicted
    if both:
        ends = [min(both), max(both)]
        for factor, style in ((1.0, "--"), (1.2, ":"), (1 / 1.2, ":")):
            axis.plot(ends, [factor * end for end in ends], style, color="grey", lw=1)
    axis.set(xlabel=f"measured {quantity.upper()}, ms", ylabel=f"predicted {quantity.upper()}, ms")
axes[0].legend(fontsize=7)
figure.suptitle(f"{points['rows_scored']} points scored, {points['rows_calibrated']} calibrate the host overheads and are not shown")

# %%
figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
kept = [label for label in labels if points["groups"][label]["tpot"]["n"]]
errors = [[100 * row["errors"]["tpot"] for row in points["rows"] if f"{row['model']} {row['backend']}" == label and row["errors"]["tpot"] is not None] for label in kept]
axis.boxplot(errors, whis=(10, 90))
axis.set_xticks(range(1, len(kept) + 1), kept, fontsize=8, rotation=60, ha="right")
axis.axhline(0, color="grey", ls="--", lw=1)
axis.set(ylabel="error of TPOT, %; whiskers at 10 and 90 %")

# %% [markdown]
# ## Kernels
#
# A table predicts every row from the others; where a model stands behind an operator, it predicts what no table holds.

# %%
kernels = validate_kernels(None, "h100-sxm-8", only=("nccl",) if QUICK else ())
names = sorted(kernels["quantities"], key=lambda name: kernels["quantities"][name]["median_abs_error"])
figure, axis = plt.subplots(figsize=(9, 0.28 * len(names) + 1.5), layout="constrained")
for key, colour in (("p90_abs_error", "lightgrey"), ("median_abs_error", "C0")):
    axis.barh(names, [100 * kernels["quantities"][name][key] for name in names], color=colour, label=key.replace("_abs_error", ""))
axis.set(xlabel="|error|, %")
axis.tick_params(axis="y", labelsize=7)
axis.legend()

# %% [markdown]
# ## Published throughput

# %%
if not QUICK:
    published = [row for row in validate_published()["rows"] if row["error"] is not None]
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(published) + 1.5), layout="constrained")
    axis.barh([row["name"] for row in published], [100 * row["error"] for row in published])
    axis.axvline(0, color="grey", lw=1)
    axis.set(xlabel="error of throughput, %")

# %% [markdown]
# ## Runs, request by request
#
# Recorded runs of 300 requests on another card, alone and as a pair; no parameter was fitted on them.

# %%
for name, place in shipped_runs().items():
    cards = read_run(place).engine["tensor_parallel_size"]
    run = validate_run(place, hardware=f"{name.split('_')[0]}-{cards}")
    quantities = ("ttft", "tpot", "latency")
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for offset, key in ((-0.2, "mean"), (0.2, "p99")):
        axis.bar([index + offset for index in range(3)], [100 * run[one][f"{key}_error"] for one in quantities], 0.4, label=key)
    axis.set_xticks(range(3), [one.upper() for one in quantities])
    axis.axhline(0, color="grey", lw=1)
    axis.set(ylabel="error, %", title=name)
    axis.legend()
