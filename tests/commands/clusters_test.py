"""In which environments a process is one of several."""

import pytest

from jaxmoe.commands.process import multi_process
from jaxmoe.commands.process.command_line import ADDRESS, PROCESS, PROCESSES, speaks
from jaxmoe.core import multihost
from jaxmoe.core.errors import InputError

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"}
CLUSTERS = {
  "a laptop": ({}, False, True),
  "a step of SLURM": ({**STEP, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, True, False),
  "the first of it": ({**STEP, "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, True, True),
  "a step of one task": ({**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False, True),
  # The script itself: nobody would start the others.
  "a script of SLURM": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False, True),
  "Open MPI": ({**MPI, "OMPI_COMM_WORLD_RANK": "1"}, True, False),
  "a TPU slice in GKE": ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, False),
  "one TPU host in GKE": ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, False, True),
  "an index of a Kubernetes job": (
    {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "3"}, False, True
  ),
}


@pytest.fixture
def environment(monkeypatch):
  """Returns a function that sets variables, after all that matter are gone."""

  def put(values):
    for prefix in ("SLURM_", "OMPI_", "TPU_", "JAXMOE_", "KUBERNETES_", "JAX_COORDINATOR"):
      for name in [name for name in multi_process.os.environ if name.startswith(prefix)]:
        monkeypatch.delenv(name)
    for name, value in values.items():
      monkeypatch.setenv(name, value)

  return put


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_environment_tells_whether_there_are_several_and_who_speaks(environment, name):
  values, several, first = CLUSTERS[name]
  environment(values)
  assert (multi_process.is_one_of_several(), speaks()) == (several, first)


@pytest.mark.parametrize(
  "values", [{}, {ADDRESS: "127.0.0.1:1"}, {ADDRESS: "127.0.0.1:1", PROCESS: "one"}]
)
def test_half_an_environment_is_refused_in_one_line(environment, values):
  environment({PROCESSES: "2", **values})
  with pytest.raises(InputError, match=f"{PROCESS}"), multi_process.processes():
    pass


def test_one_process_of_one_is_alone(environment):
  environment({PROCESSES: "1", PROCESS: "0"})
  with multi_process.processes():
    assert not multihost.is_multi_process()
