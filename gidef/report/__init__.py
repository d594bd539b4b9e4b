"""Console, record of a run, results, tables, verdict, pictures and page (`html`). Everything shown is computed from two files of a run:

`record.jsonl`  one JSON object per line, each with a "kind" (see `record`); what happened, in order.
`results.json`  what came out, written once at the end (see `results`); its layout, kept stable under "format": 1:

    format        1
    recipe        the resolved recipe;  recipe_name: str
    part          [I, N] of a run in parts: rows and trainings are those of the I-th share alone; not there in a whole run
    data          name, source, md5 (or null), synthetic: bool, counts: {train, val, test, victims, tuning, judge, ...}
    versions      {python, torch, timm, gidef, ...: str};  hardware: {...}
    seeds         [int];  world_size: int;  threads: int
    seconds       {total, train: {"<defence>/<seed>": s}, attack: {"<name>": s}}
    weights_sha256 {"<defence>/<seed>": hex of the best round's weights}
    training      [one per defence and seed: defence, seed, epsilon, delta, rounds, best_round, val_accuracy, test_accuracy, macro_f1, auc,
                  client_accuracy_mean, client_accuracy_worst, seconds_per_round, bytes_per_round: of a cohort, the shared tensors in float32 down to each client, and
                  up what the defence makes of its update (`defence.upload`: fewer bits, kept entries with their places, 64-bit entries behind masks, of those
                  who stay), without keys, shares and framing;  process_peak_gib: resident memory of the process in this
                  training, largest of any rank, process_peak_of: "training", or "process" where it could not be counted anew (not Linux), so that it is the most
                  since the process began, as it is where this is missing, gpu_peak_gib: of PyTorch's tensors in this training, likewise; and, without costs, one per evaluation.strengths but 1, of the same training: defence: the row's name,
                  trained_as: the recipe's, strength, seed and the test results]
    tuned         {"<defence>": field, value, target, accuracy: on validation at the value, reached: within a point of the target, end: "low" | "high" where the value
                  is that end of the range, else null, direction: of accuracy over the range, "falling" | "rising" | "flat", or null after one trial, monotone,
                  trials: int, tried: [[value, validation accuracy]], diverged: values of trials that did, which count as accuracy 0, not there where none did,
                  undecided: true where it would have mattered at which end of its range the field protects most, which is not known, else not there}:
                  of those at a wanted accuracy
    nets          [one per network that was attacked: defences: [names];  changes: [what was changed in it for gradients of gradients, and of its dropout];
                  parity: how far the attacks' first gradient is from the untouched network's, relative, in float64, null where not checked;
                  skipped: why it was not;  statistics: {changes, parity} of the copy that GradInversion takes statistics of]
    rows          [one per defence, attack and checkpoint:
                  defence, attack: names in the recipe;  attack_id: "A0" naive … "A12" decoder on the given latent (gidef.config.attacks), "standard" the worst
                  case per victim of an ensemble, "control" a shuffled gradient, or "own"
                  checkpoint: "untrained" | "early" | "final";  seed: int, or seeds: [int] where several are pooled
                  share_policy: "full" | "head" | "all"
                  threat: {name: str, the threat model in words, server: "honest but curious" | "malicious", knows: [what the attack is told], release: "gradient" | "delta",
                  batch_size: int, local_steps: of an epoch;  local_training: of a delta, in words, local_epochs, local_lr, local_optimiser, local_momentum: of a delta;
                  clients_in_sum: int, above 1 where the server sees sums alone, labels: "known" | "counts" | "recovered" | "searched" | "soft",
                  strength: of the noise, times the trained one, where evaluation.strengths has others than 1 and there is noise on the latent;
                  batch_norm: "none in the model" | "eval" | "train";  statistics: "batch" | "running" | "proxy" | "none", what is known of those of BatchNorm, ...}
                  epsilon, delta: of a differentially private training, null of others (epsilon alone null: infinite);  privacy_unit: "image" | "client";
                  noise_multiplier: of these
                  victims: images attacked;  observations: batches of these, which intervals are over
                  failed: of the victims, in all seeds together, without a reconstruction (scored as mid-grey)
                  client_accuracy: test accuracy of the defence's final model, whatever the checkpoint;  attacker_accuracy: in [0, 1];  mse;  psnr_db;  ssim
                  nmse: the MSE over the variance of the public images about their mean image (gidef.metrics.nmse)
                  above_class_mean_db: PSNR less that of the victim's class mean, paired
                  certified_bits: of an image beyond its label in a release, no attack learns more;  releases: that this attack sees;  fano: bound on naming the image among
                  all training images by these and its label;  uncertified: why there is no such bound;  lifetime_bits, lifetime_releases, lifetime_fano: of the whole
                  training;  uncertified_lifetime: why there is none
                  attacker_accuracy_by: {name of a further judge: as attacker_accuracy}, where there are any
                  label_recovery: share of the labels that attacks which did not fail had right (null if all failed);  oracle_restart_psnr_db: had the truth chosen the start
                  fit_first, fit: median distance of the matched updates at the start and at the end
                  noise: "searched" | "read": what an attack that matches does about the noise on the latent, not there of others and where there is none; "read" if it
                  was of every observation
                  of: the attack that a control repeats
                  ensemble: name of the ensemble that the attack is a member of;  version, members, worst_by: of an ensemble's own row, which counts failed
                  attempts on a victim only where all failed;  without: of its row without bounds, the members that were left out;  threat.beyond: {member:
                  what it is handed beyond the threat model} of the row with them
                  calibration: how many attacks ran as one program, how, and what else was tried
                  tuned: of an attack whose settings were sought on images kept for tuning: setting {field: value}, psnr_db there, images, seconds, tried: [{setting,
                  psnr_db, failed}]
                  in_loop_psnr_db: of the clients' own decoder, beside a post-hoc one (A12)
                  iterations, restarts: int;  seconds: float;  note: str]
    failed        [defence, seed, error: of trainings that diverged, or had no target for that reason; they are in no row. Not there where none did]
    not_applicable [defence, attack, attack_id, reason: of attacks that have nothing to attack in a defence, or are not simulated there, and so no row]
    bounds        [name: "constant grey" | "mean image" | "class mean" | "nearest public neighbour" | "shuffled gradient";
                  of, checkpoint: the defence and the checkpoint of a shuffled gradient, of each its own;
                  mse, nmse, psnr_db, ssim, attacker_accuracy, attacker_accuracy_by: what a guess without any gradient scores on the same victims]
    comparisons   [the learned perturbation beside another defence (`paired`): defences, attacks, attack_ids, client_accuracies: [ours, other];
                  under: "naive" | "strongest";  checkpoint;  share_policy;  adaptive: [whether other than naive attacks were run on each]
                  psnr_db, attacker_accuracy, mse: [ours, other]
                  psnr_db_difference, attacker_accuracy_difference: ours - other;  attacker_accuracy_change, mse_change: ours / other - 1; all four
                  {mean, low, high}, of the same victims, paired;  victims, observations: of these intervals, 0 where there are none]
    starts        [a form of an attack beside another that differs in restarts and halving alone, the most restarts that all run to their end (`paired.starts`): as
                  of comparisons, without `under` and `adaptive`;  seconds: [ours, other], null where they were not measured]
    judge         {accuracy_on_truth, accuracy_on_test, chance: in [0, 1];  others: {name of a further judge: its two accuracies}}
    choice        null, or of a recipe with `choose`, whose undefended net was trained: {points, on: images attacked, take: the defence or null, grid: [{defence, val_accuracy, psnr_db of the strongest
                  attack or null, within: of the points}]}
    pictures      [paths relative to results.json]
    verdict       [sentences, see `verdict`]

A measured value is a number, null, or {mean, low, high, worst, worst_decile}: the mean over victims (per-image values, averaged over
seeds), its 95 % bootstrap interval over observations (null of one observation of several images), the most leaked image and the mean of the
most leaked tenth, each image by the seed in which it leaked most. Of guesses without a gradient each image is an observation. Accuracies
lie in [0, 1], PSNR is in dB.
JSON has no NaN and no infinity: both become null, so a metric that can be infinite is capped by whoever measures it.
"""

from gidef.report import html, joined, results, tables, tradeoff
from gidef.report.choice import choice
from gidef.report.console import Console
from gidef.report.pictures import attack_curves, grid, learning_curves, partition_bars, preview
from gidef.report.record import Record, read
from gidef.report.verdict import verdict

__all__ = [
    "Console",
    "Record",
    "attack_curves",
    "choice",
    "grid",
    "html",
    "joined",
    "learning_curves",
    "partition_bars",
    "preview",
    "read",
    "results",
    "tables",
    "tradeoff",
    "verdict",
]
