"""A process forked from one that has computed with several threads: it computes too, and does not hang."""

import subprocess
import sys
import textwrap

import pytest

PARENT = textwrap.dedent(
    """
    import os, signal, time
    import open_clip.transformer, torch
    import residual_kernels as rk

    torch.set_num_threads(4)
    torch.manual_seed(0)
    tower = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=64, layers=2, heads=2, mlp_ratio=2, output_dim=32
    ).eval()
    images, labels = torch.randn(96, 3, 32, 32), torch.arange(96) % 2
    head = rk.ZeroShotHead(torch.randn(32, 2), ["a", "b"])


    def job():
        cache = rk.encode(tower, [(images, labels)], class_names="ab")
        adapter = rk.ResiDual(tower, rk.fit_bases(tower, cache).truncate(components=3))
        rk.fit(adapter, head, cache, cache, epochs=2)
        with torch.no_grad():
            found = [adapter(images), adapter.weight.detach().clone()]
        adapter.detach()
        return found


    expected = job()
    large = torch.randn(4, 512, 96)  # enough for several threads
    (large @ large.mT).sum()
    child = os.fork()
    if child == 0:
        if torch.get_num_threads() != 1:  # with four it would wait for threads that are not there
            os._exit(3)
        (large @ large.mT).sum()
        found = job()
        os._exit(0 if all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, expected)) else 4)
    assert torch.get_num_threads() == 4  # the parent keeps its own
    end = time.monotonic() + 100
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            print("ended", os.waitstatus_to_exitcode(status))
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("hung")
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_a_forked_child_computes_with_one_thread():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=240)
    assert done.stdout == "ended 0\n", done.stderr[-2000:]
