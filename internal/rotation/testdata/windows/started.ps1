
function Stop-Step([int]$status, [string]$why) {
  $e = [System.Exception]::new($why)
  $e.Data['status'] = $status
  throw $e
}
function Test-File([string]$path) { return [System.IO.File]::Exists($path) }
function Get-Tree([string]$stage, [string]$path) {
  return [System.IO.Path]::Combine($RUN, $stage, $path.Replace(':', ''))
}
function Get-Parts([string]$item) {
  $i = $item.IndexOf(':')
  return @($item.Substring(0, $i), $item.Substring($i + 1))
}
function Get-Text([string]$path) {
  if (-not (Test-File $path)) { return '' }
  return [System.IO.File]::ReadAllText($path)
}
function Get-BytesHash([byte[]]$bytes) {
  $sha = [System.Security.Cryptography.SHA256]::Create()
  try { return [System.BitConverter]::ToString($sha.ComputeHash($bytes)).Replace('-', '') } finally { $sha.Dispose() }
}

$all = @(Get-Process -Name $argv[0] -ErrorAction SilentlyContinue | Sort-Object -Property StartTime)
if ($all.Count -eq 0) { 'absent'; return }
$start = $all[0].StartTime.ToUniversalTime().AddMilliseconds(50)
foreach ($path in @($argv | Select-Object -Skip 1)) {
  if ((Test-File $path) -and [System.IO.File]::GetLastWriteTimeUtc($path) -gt $start) { 'no'; return }
}
'yes'
