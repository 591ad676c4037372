//! A bucket as version 1 of the formats left it is read, verified and restored for ever.
//!
//! `testdata/bucket-v1` was made by `init` and `backup` on four embedded stores below `/srv/sample`.

use std::path::{Path, PathBuf};
use std::process::Command;

const POINT: &str = "ry3cahfxjv";
const COMMIT: &str = "f62fe1486e91890c4462ff45da7671d230aa6f58";

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("create");
    for entry in std::fs::read_dir(from).expect("list") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("type").is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).expect("copy")),
        }
    }
}

fn run(folder: &Path, args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_stillpoint"))
        .args(args)
        .env("STILLPOINT_CONFIG", folder.join("platform.yaml"))
        .env("STILLPOINT_STATE", folder.join("state"))
        .output()
        .expect("runs");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{args:?}: {text}");
    text
}

#[test]
fn the_first_buckets_points_are_listed_verified_and_restored() {
    let sample = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/bucket-v1");
    let folder = tempfile::tempdir().expect("temp");
    let home = folder.path();
    copy(&sample.join("bucket"), &home.join("bucket"));
    std::fs::copy(sample.join("key.txt"), home.join("key.txt")).expect("key");
    let platform = std::fs::read_to_string(sample.join("platform.yaml")).expect("platform.yaml");
    let shown = home.display().to_string();
    let platform = platform.replace("/srv/sample/bucket", &format!("{shown}/bucket"));
    let platform = platform.replace("/srv/sample/stillpoint.key", &format!("{shown}/key.txt"));
    std::fs::write(home.join("platform.yaml"), platform).expect("write");

    assert!(run(home, &["list"]).contains(POINT));
    assert!(run(home, &["verify", "latest"]).contains("proven"));
    run(home, &["check", "--data"]);
    let out = home.join("out");
    let screen = run(home, &["restore", POINT, "--yes", "--to", out.to_str().expect("text")]);
    assert!(screen.contains("every store equals the point"), "{screen}");

    let read = |path: &str| std::fs::read(out.join(path)).expect(path);
    assert_eq!(read("files/greeting.txt"), b"hello\n");
    assert_eq!(read("files/zeros.bin"), vec![0; 20_000]);
    assert_eq!(std::fs::read_link(out.join("files/link")).expect("link"), Path::new("greeting.txt"));
    assert_eq!(read("objects/models/7/weights.bin"), b"weights-7");
    assert_eq!(read("objects/models/8 %2F.bin"), b"weights-8");
    let database = rusqlite::Connection::open(out.join("registry/registry.db")).expect("opens");
    let rows: (i64, String) = database
        .query_row("SELECT count(*), max(sha) FROM models", [], |row| Ok((row.get(0)?, row.get(1)?)))
        .expect("rows");
    assert_eq!(rows, (2, COMMIT.to_owned()));
    let mut git = Command::new("git");
    git.args(["-c", "safe.directory=*", "-C"]).arg(out.join("code")).args(["cat-file", "-t", COMMIT]);
    let kind = git.output().expect("git").stdout;
    assert_eq!(String::from_utf8_lossy(&kind).trim(), "commit");
}
