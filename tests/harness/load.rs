//! Guests that write to an NBD address with fio.

use std::process::{Child, Command, Stdio};

/// fio without verification: its writes may race with each other.
pub fn fio(uri: &str, arguments: &[&str]) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=load", "--ioengine=nbd", "--direct=1", "--thread=1", "--group_reporting=1"]);
    fio.arg(format!("--uri={uri}")).args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
    fio
}

/// A guest that writes at random places until it is stopped or dropped.
pub struct Load(Child);

impl Load {
    pub fn start(uri: &str, arguments: &[&str]) -> Self {
        let how = ["--rw=randwrite", "--iodepth=8", "--time_based", "--runtime=600"];
        Self(fio(uri, &[&how, arguments].concat()).spawn().expect("fio"))
    }

    /// It must have run without an error until now.
    pub fn stop(mut self) {
        assert!(self.0.try_wait().expect("fio").is_none(), "the guest had an error");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).ok();
    }
}
