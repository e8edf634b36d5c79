import subprocess, time
from pathlib import Path
import pytest
from search_tests.conftest import *  # noqa

@pytest.fixture
def disk(home):
    p = home / "disk"; p.mkdir()
    subprocess.run(["mount","-t","tmpfs","-o","size=4m","tmpfs",str(p)],check=True)
    yield p
    subprocess.run(["umount","-l",str(p)])

@pytest.mark.parametrize("everything",[False,True])
def test_full(search, tiny, home, disk, monkeypatch, everything):
    tiny.write_text(tiny.read_text()+"\n[workers]\nmax_outage = 1\nheartbeat=0.5\nlost_after=5\n")
    import search.trial as t
    real = t.fit; n=[0]
    def fit(*a, **k):
        n[0]+=1
        if n[0]==3:
            with (disk/"ballast").open("wb") as f:
                try:
                    while True: f.write(b"x"*4096); f.flush()
                except OSError: pass
        return real(*a,**k)
    monkeypatch.setattr(t,"fit",fit)
    words=("run","--study",tiny,"--dataset","digits","--trials",6,"--storage",f"sqlite:///{disk}/s.db")
    if everything: words += ("--out", disk/"out")
    b=time.time()
    e=search(*words); print(e.status,e.out,"ERR",e.err, time.time()-b)
    print(subprocess.run(["ls","-lR",str(disk)],capture_output=True,text=True).stdout)
    s=search("status","--storage",f"sqlite:///{disk}/s.db"); print(s)
    (disk/"ballast").unlink()
    e=search(*words); print(e.status,e.out,"ERR",e.err)
